"""The served page for programs: endpoints through gradio's own client, what is refused, and many visitors at once."""

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.paths import bundled
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.images import picture

pytest.importorskip("gradio")


def handed(path: Path):
    from gradio_client import handle_file

    return handle_file(str(path))


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_endpoint_sample(client):
    path, facts = client.predict(run="digits-reverse", label=3, seed=17, guidance=2.0, api_name="/sample")
    expected = rl.sample(rl.load("digits-reverse"), [17], 3, 2.0).images[0]
    assert torch.allclose(torch.tensor(facts["values"]), expected, atol=1e-5)
    with Image.open(path) as opened:
        assert opened.size == (64, 64)


def test_endpoint_classify(client, tmp_path):
    run = rl.load("digits-none")
    picture(run.data("test").x[2], scale=4).save(tmp_path / "digit.png")
    answer = client.predict(run="digits-none", image=handed(tmp_path / "digit.png"), method="bayes", api_name="/classify")
    with Image.open(tmp_path / "digit.png") as opened:
        expected = rl.classify(run, from_picture(opened, 1, 8), "bayes")
    assert answer["label"] == str(int(expected.label))
    assert [answer["scores"][k] for k in run.classes] == pytest.approx(expected.scores[0].tolist(), abs=1e-3)


def test_endpoint_trace(client):
    path, facts = client.predict(run="digits-reverse", seed=5, label=-1, tap="block.3.layer.2", api_name="/trace")
    run = rl.load("digits-reverse")
    expected = rl.trace(run, noise(run.flow, [5]), -1, "reverse", "block.3.layer.2")
    assert torch.allclose(torch.tensor(facts["state"]), expected.states["block.3.layer.2"][0], atol=1e-4)
    assert facts["module_path"] == "blocks.2.transformer.layers.1"
    assert facts["error"] < 1e-4
    with Image.open(path) as opened:
        assert opened.width > 4 * opened.height, "noise and four blocks in a row"


def test_endpoint_runs_lists_local_ones_too(client):
    names = [entry["name"] for entry in client.predict(api_name="/runs")]
    assert {"digits-none", "digits-reverse", "small", "damaged"} <= set(names)
    _, facts = client.predict(run="small", label=1, seed=0, guidance=0.0, api_name="/sample")
    assert len(facts["values"][0]) == 8


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/sample", {"run": "digits-nobody", "label": 3, "seed": 0, "guidance": 0.0}, "no run 'digits-nobody'"),
        ("/sample", {"run": "../runs/digits-none", "label": 3, "seed": 0, "guidance": 0.0}, "no run"),
        ("/sample", {"run": "damaged", "label": 3, "seed": 0, "guidance": 0.0}, "damaged or no safetensors file"),
        ("/sample", {"run": "digits-none", "label": 11, "seed": 0, "guidance": 0.0}, "label 11 is out of range"),
        ("/sample", {"run": "digits-none", "label": 1.5, "seed": 0, "guidance": 0.0}, "label must be a whole number"),
        ("/sample", {"run": "digits-none", "label": 1, "seed": -5, "guidance": 0.0}, "-5"),
        ("/sample", {"run": "digits-none", "label": 1, "seed": 2**40, "guidance": 0.0}, "1099511627776"),
        ("/sample", {"run": "digits-none", "label": 1, "seed": 0, "guidance": -1.0}, "-1"),
        ("/trace", {"run": "digits-none", "seed": 0, "label": 1, "tap": "block.9.layer.1"}, "block.9"),
        ("/trace", {"run": "digits-none", "seed": 0, "label": 1, "tap": "block.*.in"}, "is not a tap"),
        ("/trace", {"run": "digits-none", "seed": 0, "label": 99, "tap": "block.1.in"}, "label 99 is out of range"),
    ],
)
def test_endpoint_mistakes_are_explained(client, endpoint, arguments, message):
    with pytest.raises(Exception, match=message):
        client.predict(**arguments, api_name=endpoint)


@pytest.mark.parametrize(
    ("content", "message"), [(b"no picture", "x.png is not a picture"), (b"", "x.png is empty"), (None, "no image given")]
)
def test_endpoint_refuses_what_is_no_picture(client, tmp_path, content, message):
    image = None
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
        image = handed(tmp_path / "x.png")
    with pytest.raises(Exception, match=message):
        client.predict(run="digits-none", image=image, method="bayes", api_name="/classify")
    assert client.predict(run="digits-none", label=1, seed=0, guidance=0.0, api_name="/sample"), "the page lives on"


def test_endpoint_takes_pictures_of_every_kind(client, tmp_path):
    digit = picture(rl.load("digits-none").data("test").x[2], scale=10)
    photo = digit.resize((5000, 4000), Image.Resampling.NEAREST).crop((500, 0, 4500, 4000))  # 16 megapixels
    clear = digit.convert("RGBA")
    kinds = {"photo.jpg": photo, "cmyk.jpg": digit.convert("CMYK"), "clear.png": clear, "sixteen.png": digit.convert("I;16")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        answer = client.predict(run="digits-none", image=handed(tmp_path / name), method="gradient", api_name="/classify")
        assert len(answer["scores"]) == 10, name


def test_endpoint_refuses_files_that_are_too_large(client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + b"\0" * 11 * 2**20)
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        client.predict(run="digits-none", image=handed(tmp_path / "large.png"), method="bayes", api_name="/classify")


# --- safe by default --------------------------------------------------------------------------------------------------


def test_only_the_endpoints_are_public(page):
    with urllib.request.urlopen(f"{page}/gradio_api/info") as answer:
        named = json.load(answer)["named_endpoints"]
    assert set(named) == {"/runs", "/sample", "/classify", "/trace"}
    parameters = {name: [p["parameter_name"] for p in named[name]["parameters"]] for name in named}
    assert parameters["/sample"] == ["run", "label", "seed", "guidance"]
    assert parameters["/classify"] == ["run", "image", "method"]
    assert parameters["/trace"] == ["run", "seed", "label", "tap"]
    assert all("description" in named[name] for name in named)


def test_files_of_the_machine_are_not_served(page, page_runs):
    for path in ("/etc/hostname", str(bundled("app") / "demo.py"), str(page_runs / "small" / "config.json")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page}/gradio_api/file={path}")
        with caught.value as answer:
            assert answer.code in (403, 404)


def test_the_page_says_nothing_to_anybody_else(page):
    with urllib.request.urlopen(f"{page}/config") as answer:
        config = json.load(answer)
    assert not config.get("analytics_enabled")
    assert not config.get("is_space")


# --- many visitors ----------------------------------------------------------------------------------------------------


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
def test_eight_visitors_at_once_get_their_own_answers(page_server, tmp_path):
    """For a minute: every answer is that of the library, and memory stays where it was after the first twenty seconds."""
    from gradio_client import Client

    page, pid = page_server
    runs = {name: rl.load(name) for name in ("digits-none", "digits-reverse")}
    x = runs["digits-none"].data("test").x
    for row in range(8):
        picture(x[row], scale=4).save(tmp_path / f"{row}.png")
    wrong, counts, levels = [], [0] * 8, []
    begin = time.monotonic()

    def visit(number: int) -> None:
        name = ("digits-none", "digits-reverse")[number % 2]
        mine = Client(page, verbose=False)
        turn = 0
        while time.monotonic() - begin < 60:
            seed = 1000 * number + turn
            if turn % 3 == 0:
                _, facts = mine.predict(run=name, label=number, seed=seed, guidance=0.0, api_name="/sample")
                made, expected = torch.tensor(facts["values"]), rl.sample(runs[name], [seed], number).images[0]
            elif turn % 3 == 1:
                _, facts = mine.predict(run=name, seed=seed, label=number, tap="block.2.layer.1", api_name="/trace")
                made = torch.tensor(facts["state"])
                z = noise(runs[name].flow, [seed])
                expected = rl.trace(runs[name], z, number, "reverse", "block.2.layer.1").states["block.2.layer.1"][0]
            else:
                file = tmp_path / f"{number}.png"
                answer = mine.predict(run=name, image=handed(file), method="gradient", api_name="/classify")
                with Image.open(file) as opened:
                    expected = rl.classify(runs[name], from_picture(opened, 1, 8)).scores[0]
                made = torch.tensor(list(answer["scores"].values()))
            if not torch.allclose(made, expected, atol=1e-3):
                wrong.append((number, turn, float((made - expected).abs().max())))
            counts[number] += 1
            turn += 1
        mine.close()

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(8)]
    for visitor in visitors:
        visitor.start()
    while any(visitor.is_alive() for visitor in visitors):
        levels.append((time.monotonic() - begin, memory(pid)))
        time.sleep(1)
    assert not wrong
    assert min(counts) >= 3, "everybody is served"
    settled = max(level for at, level in levels if at < 20)
    print(f"\n{sum(counts)} answers, {min(counts)} to {max(counts)} a visitor; memory {settled:.0f} -> {levels[-1][1]:.0f} MiB")
    assert levels[-1][1] < 1.1 * settled
