"""Checkpoints of the public TARFlow code, held against the published equations written out over their own tensors."""

import contextlib
import json
import math
import pathlib
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabWarning
from rrepa_lab.runs.import_tarflow import facts, import_tarflow
from rrepa_lab.sampling.sample import noise

SIDE, PATCH, CHANNELS, WIDTH, BLOCKS, LAYERS, CLASSES = 4, 4, 3, 128, 3, 2, 5
TOKENS, SIZE = SIDE**2, CHANNELS * PATCH**2
STEM = f"flowers_model_{PATCH}_{WIDTH}_{BLOCKS}_{LAYERS}_0.05"


def make_state(
    classes=CLASSES, shift_only=False, *, width=WIDTH, side=SIDE, size=SIZE, blocks=BLOCKS, layers=LAYERS, seed=0
) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of the public code."""
    draw = torch.Generator().manual_seed(seed)
    tokens = side**2

    def normal(*shape, std=0.04):
        return std * torch.randn(*shape, generator=draw)

    state = {"var": torch.rand(tokens, size, generator=draw) * 1.5 + 0.5 if shift_only else torch.ones(tokens, size)}

    def linear(name, n_in, n_out, std=0.04):
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(n_out, n_in, std=std), normal(n_out)

    def layer_norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width, std=0.1), normal(width, std=0.1)

    for b in range(blocks):
        block = f"blocks.{b}"
        linear(f"{block}.proj_in", size, width, std=0.1)
        state[f"{block}.pos_embed"] = normal(tokens, width, std=0.5)
        if classes:
            state[f"{block}.class_embed"] = normal(classes, 1, width, std=0.5)
        state[f"{block}.attn_mask"] = torch.ones(tokens, tokens).tril()
        for j in range(layers):
            layer = f"{block}.attn_blocks.{j}"
            layer_norm(f"{layer}.attention.norm")
            linear(f"{layer}.attention.qkv", width, 3 * width, std=0.15)
            linear(f"{layer}.attention.proj", width, width)
            layer_norm(f"{layer}.mlp.norm")
            linear(f"{layer}.mlp.main.0", width, 4 * width)
            linear(f"{layer}.mlp.main.2", 4 * width, width)
        linear(f"{block}.proj_out", width, size if shift_only else 2 * size, std=0.03)
        if not shift_only:  # small log-scales, the first half: samples grow with their exponential, token after token
            state[f"{block}.proj_out.weight"][:size] *= 0.2
    return state


# --- the public model as equations, in float64, one plain function after another --------------------------------------


class Oracle:
    """z and x by the definitions: no cache, no batching of branches, explicit softmax."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items()}
        self.blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def linear(self, name, h):
        return h @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def layer_norm(self, name, h):
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name, h, temperature):
        count, width = h.shape[1:]
        q, k, v = self.linear(f"{name}.qkv", self.layer_norm(f"{name}.norm", h)).split(width, dim=-1)
        later = torch.ones(count, count).triu(1).bool()
        heads = []
        for start in range(0, width, 64):
            part = slice(start, start + 64)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / (math.sqrt(64) * temperature)
            heads.append(logits.masked_fill(later, -torch.inf).softmax(-1) @ v[..., part])
        return self.linear(f"{name}.proj", torch.cat(heads, -1))

    def predict(self, b, tokens, labels, temperature=1.0):
        """(mu, alpha), each (B, n, P), that the first n tokens in the block's order give for the token after each."""
        name = f"blocks.{b}"
        positions = self.state[f"{name}.pos_embed"]
        h = self.linear(f"{name}.proj_in", tokens) + (positions.flip(0) if b % 2 else positions)[: tokens.shape[1]]
        table = self.state.get(f"{name}.class_embed")
        if table is not None:
            h = h + torch.stack([table.mean(0) if k is None or k < 0 else table[k] for k in labels])
        layer = 0
        while f"{name}.attn_blocks.{layer}.mlp.norm.weight" in self.state:
            at = f"{name}.attn_blocks.{layer}"
            h = h + self.attention(f"{at}.attention", h, temperature)
            wide = self.linear(f"{at}.mlp.main.0", self.layer_norm(f"{at}.mlp.norm", h))
            h = h + self.linear(f"{at}.mlp.main.2", wide * (1 + torch.erf(wide / math.sqrt(2))) / 2)
            layer += 1
        out = self.linear(f"{name}.proj_out", h)
        size = tokens.shape[-1]
        return (out, torch.zeros_like(out)) if out.shape[-1] == size else (out[..., size:], out[..., :size])

    def encode(self, x, labels, patch=PATCH):
        """Noise (B, T, P), and the sum over blocks of the mean of -alpha, (B,)."""
        tokens = F.unfold(x.double(), patch, stride=patch).transpose(1, 2)
        logdet = torch.zeros(len(x), dtype=torch.float64)
        for b in range(self.blocks):
            tokens = tokens.flip(1) if b % 2 else tokens
            mu, alpha = self.predict(b, tokens, labels)
            first = torch.zeros_like(mu[:, :1])
            mu, alpha = torch.cat([first, mu[:, :-1]], 1), torch.cat([first, alpha[:, :-1]], 1)
            tokens = (tokens - mu) * (-alpha).exp()
            logdet -= alpha.mean((1, 2))
            tokens = tokens.flip(1) if b % 2 else tokens
        return tokens, logdet

    def decode(self, z, labels, guidance=0.0, annealed=False, temperature=1.0):
        """Images (B, C, H, W) from noise that has the variance of the prior."""
        z = z.double()
        for b in reversed(range(self.blocks)):
            z = z.flip(1) if b % 2 else z
            x = z[:, :1]
            for i in range(1, z.shape[1]):
                mu, alpha = (value[:, -1] for value in self.predict(b, x, labels))
                if guidance:
                    w = guidance * i / (z.shape[1] - 1) if annealed else guidance
                    mu_u, alpha_u = (value[:, -1] for value in self.predict(b, x, [None] * len(x), temperature))
                    mu, alpha = mu + w * (mu - mu_u), alpha + w * (alpha - alpha_u)
                x = torch.cat([x, (mu + alpha.exp() * z[:, i])[:, None]], 1)
            z = x.flip(1) if b % 2 else x
        image = (SIDE * PATCH, SIDE * PATCH)
        return F.fold(z.transpose(1, 2), image, PATCH, stride=PATCH)


KINDS = {"conditional": (CLASSES, False), "unconditional": (0, False), "volume-preserving": (CLASSES, True)}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Of each kind the public tensors as equations, and the imported run as it is read back."""
    folder = tmp_path_factory.mktemp("published")

    def make(kind):
        state = make_state(*KINDS[kind])
        (folder / kind).mkdir()
        torch.save(state, folder / kind / f"{STEM}.pth")
        import_tarflow(folder / kind / f"{STEM}.pth", folder / kind / "run")
        return Oracle(state), rl.load(folder / kind / "run")

    return {kind: make(kind) for kind in KINDS}


def pictures(count=3, seed=1):
    return torch.rand(count, CHANNELS, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [[0, 3, CLASSES - 1], [2, -1, -1], None])
def test_noise_and_density_are_the_published_ones(imported, kind, labels):
    oracle, run = imported[kind]
    if labels and not run.config.flow.classes:
        labels = [-1] * 3
    x = pictures()
    out = run.flow(x, None if labels is None else torch.tensor(labels))
    z, logdet = oracle.encode(x, labels or [None] * 3)
    assert float((out.z - z).abs().max()) < 1e-4
    assert float((out.logdet / z[0].numel() - logdet).abs().max()) < 1e-6
    prior = torch.distributions.Normal(0, oracle.state["var"].sqrt()).log_prob(z).sum((1, 2))
    density = run.flow.log_prob(x, None if labels is None else torch.tensor(labels))
    assert float((density - prior - logdet * z[0].numel()).abs().max()) < 1e-2
    # the weights do something
    start = run.flow.tokenize(x)
    assert float((z - start).abs().mean()) > 0.1
    assert bool((logdet.abs() > 1e-3).all()) or kind == "volume-preserving"


STEERED: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 1.5},
    "annealed": {"guidance": 1.5, "annealed": True},
    "temperature": {"guidance": 1.5, "temperature": 0.5},
    "all": {"guidance": 1.5, "annealed": True, "temperature": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", STEERED)
def test_samples_are_the_published_ones(imported, kind, how):
    oracle, run = imported[kind]
    labels, seeds = [0, 3, -1] if run.config.flow.classes else [-1] * 3, [5, 6, 7]
    draws = torch.stack([torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    z = draws * oracle.state["var"].sqrt()
    expected = oracle.decode(z, labels, **STEERED[how])
    y = torch.tensor(labels) if run.config.flow.classes else None
    assert float((run.flow.inverse(z.float(), y, **STEERED[how]).x - expected).abs().max()) < 1e-4
    given = STEERED[how]
    rule = rl.Guidance(given.get("guidance", 0.0), given.get("annealed", False), given.get("temperature", 1.0))
    # without a label guidance steers nothing here either, which is noted
    noted = pytest.warns(LabWarning, match="no effect") if y is None and STEERED[how] else contextlib.nullcontext()
    with noted:
        made = rl.sample(run, seeds, labels if run.config.flow.classes else None, rule, denoise=False)
    assert float((made.path[-1] - expected).abs().max()) < 1e-4
    assert float((made.images - expected.clamp(-1, 1)).abs().max()) < 1e-4
    assert 1 < float(expected.abs().max()) < 20
    # not the noise itself, and each way of steering is a way of its own
    assert float((run.flow.tokenize(expected.float()) - z).abs().mean()) > 0.1
    if given and (run.config.flow.classes or "temperature" in given):
        lesser = dict(list(given.items())[:-1])
        assert float((oracle.decode(z, labels, **lesser) - expected).abs().max()) > 0.1


def test_the_noise_of_a_volume_preserving_flow_has_the_variance_on_file(imported):
    oracle, run = imported["volume-preserving"]
    assert run.config.flow.volume_preserving
    assert torch.equal(run.flow.prior_var.double(), oracle.state["var"])
    assert float((oracle.state["var"] - 1).abs().max()) > 0.3
    spread = noise(run.flow, range(4000)).var(dim=0)
    assert float((spread / run.flow.prior_var - 1).abs().max()) < 0.15
    assert imported["conditional"][1].flow.prior_var is None


def test_the_whole_kit_reads_it(imported):
    _, run = imported["conditional"]
    x = pictures()
    assert rl.sample(run, [0], [1]).images.isfinite().all()
    traced = rl.trace(run, x, torch.tensor([0, 1, 2]), "reverse", "block.*.layer.*")
    assert len(traced.states) == BLOCKS * LAYERS
    assert float(traced.error.max()) < 1e-4
    for method in ("gradient", "bayes"):
        assert rl.classify(run, x, method).scores.shape == (3, CLASSES)
    config = run.config
    assert (config.name, config.align.strategy, config.flow.noise_std) == (STEM, "none", 0.05)
    assert (config.data.name, config.data.image_size, config.data.path) == ("folder", 16, None)
    assert run.classes == ["0", "1", "2", "3", "4"]
    card = (run.directory / "card.md").read_text()
    assert "apple/ml-tarflow" in card
    assert "no average (EMA)" in card
    assert all(value.dtype == torch.float32 for value in run.flow.state_dict().values())


def cli(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def small_state(**more):
    return make_state(**{"width": 64, "side": 2, "size": 12, "blocks": 2, "layers": 1, "classes": 3} | more)


SMALL = "set_model_2_64_2_1_0.07.pth"


@pytest.fixture
def put(tmp_path):
    """Save tensors, or anything, as a file."""

    def put(state, name=SMALL):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return put


def test_command_line(capsys, put, tmp_path):
    (tmp_path / "photos").mkdir()
    path = put(small_state())
    status, text, err = cli(
        capsys, "import-tarflow", path, tmp_path / "run", "--name", "mine", "--data", tmp_path / "photos", "--json"
    )
    assert (status, err) == (0, "")
    told = json.loads(text)
    run = rl.load(tmp_path / "run")
    assert told["parameters"] == sum(p.numel() for p in run.flow.parameters())
    assert (told["name"], told["image"], told["classes"], told["volume_preserving"]) == ("mine", "3x4x4", 3, False)
    assert told["noise"] == "gaussian, sigma 0.07"
    assert run.config.data.path == str(tmp_path / "photos")
    status, text, _ = cli(capsys, "describe", tmp_path / "run")
    assert (status, "2 blocks x 1 layers, width 64" in text) == (0, True)

    plain = put(small_state(classes=0), "plain.pth")
    status, text, _ = cli(capsys, "import-tarflow", plain, tmp_path / "plain", "--noise", "uniform")
    assert (status, f"rrepa-lab sample {tmp_path / 'plain'} --seeds" in text) == (0, True)
    assert rl.load(tmp_path / "plain").config.flow.noise == "uniform"
    status, _, err = cli(capsys, "import-tarflow", plain, tmp_path / "other")
    assert (status, "--noise" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    "ending", [".pth", ".pt", ".ckpt", ".bin", "", "_epoch_120.pth", "-epoch120.pt", "_step_400_ema.pth", "_last.pt"]
)
def test_the_name_of_a_file_tells_the_noise_whatever_its_ending(put, tmp_path, ending):
    run = import_tarflow(put(small_state(), SMALL.removesuffix(".pth") + ending), tmp_path / "run")
    assert (run.config.flow.noise, run.config.flow.noise_std) == ("gaussian", 0.07)
    assert run.config.flow.patch_size == 2
    with pytest.raises(rl.LabError, match="the file name says noise 0.07, the option 0.1"):
        import_tarflow(tmp_path / f"{SMALL.removesuffix('.pth')}{ending}", tmp_path / "other", noise=0.1)


@pytest.mark.parametrize(
    ("key", "average"),
    [("model", False), ("state_dict", False), ("model_state_dict", False), ("model_ema", True), ("ema", True)],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "model._orig_mod."])
def test_the_tensors_of_a_training_checkpoint_are_found(put, tmp_path, key, average, prefix):
    state = small_state()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    held = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}}
    held |= {"model": {prefix + name: value for name, value in other.items()}} if average else {}
    run = import_tarflow(put(held | {key: {prefix + name: value for name, value in state.items()}}), tmp_path / "run")
    assert torch.equal(run.flow.block(1).proj_in.weight, state["blocks.0.proj_in.weight"]), "not the zeros beside an average"
    assert f"its {key!r}" in run.config.origin
    assert ("; no average (EMA)" in run.config.origin) is not average


def test_blocks_that_were_compiled_alone(put, tmp_path):
    state = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in small_state().items()}
    run = import_tarflow(put(state), tmp_path / "run")
    assert torch.equal(run.flow.block(2).proj_in.weight, state["blocks.1._orig_mod.proj_in.weight"])


def test_prefixes_half_precision_and_names_of_classes(put, tmp_path):
    state = small_state(classes=1000)
    path = put({f"_orig_mod.module.{key}": value.half() for key, value in state.items()}, f"imagenet{SMALL[3:]}")
    run = rl.import_tarflow(str(path), str(tmp_path / "run"))
    again = rl.load(tmp_path / "run")
    assert run.classes == again.classes
    assert (run.classes[0], run.classes[999].split(",")[0]) == ("tench, Tinca tinca", "toilet tissue")
    assert len(set(run.classes)) == 1000, "tables are keyed by name"
    table = again.flow.block(2).class_embed
    assert table is not None
    assert torch.equal(table, state["blocks.1.class_embed"][:, 0].half().float())
    for name, value in run.flow.state_dict().items():
        assert torch.equal(value, again.flow.state_dict()[name])
    assert facts(run)["classes"] == 1000


def test_a_patch_the_tensors_leave_open(put, tmp_path):
    grey = put(small_state(size=16), "grey.pth")
    with pytest.raises(rl.LabError, match="1 x 4 x 4 or 4 x 2 x 2.*--patch-size or --channels"):
        import_tarflow(grey, tmp_path / "run", noise=0.1)
    options: list[dict[str, Any]] = [{"channels": 1}, {"patch_size": 4}, {"image_size": 8}]
    for number, option in enumerate(options):
        config = import_tarflow(grey, tmp_path / f"run{number}", noise=0.1, **option).config
        assert (config.flow.channels, config.flow.patch_size, config.data.image_size) == (1, 4, 8)
    with pytest.raises(rl.LabError, match="4 channels"):
        import_tarflow(grey, tmp_path / "run", noise=0.1, channels=4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("set_model_4_64_2_1_0.07.pth", {}, "the file name says patch size 4, the tensors 2"),
        ("set_model_2_768_2_1_0.07.pth", {}, "the file name says width 768, the tensors 64"),
        ("set_model_2_64_8_1_0.07.pth", {}, "the file name says blocks 8, the tensors 2"),
        ("set_model_2_64_2_8_0.07.pth", {}, "the file name says layers 8, the tensors 1"),
        (SMALL, {"image_size": 64}, "the option says image size 64, the tensors 4"),
        (SMALL, {"patch_size": 4}, "the option says patch size 4, the tensors 2"),
        (SMALL, {"channels": 1}, "the option says channels 1, the tensors 3"),
        (SMALL, {"noise": "0.1"}, "the file name says noise 0.07, the option 0.1"),
        (SMALL, {"noise": "uniform"}, "the file name says noise 0.07, the option uniform"),
        (SMALL, {"head_width": 48}, "head_width 48 does not divide width 64"),
        (SMALL, {"name": "no/name"}, "choose one with --name"),
        (SMALL, {"data": "/no/such/folder"}, "no image folder at /no/such/folder"),
        ("any.pth", {}, "does not tell the training noise: give --noise"),
        ("any.pth", {"noise": "loud"}, "noise must be a number, such as 0.05, or uniform, not 'loud'"),
        ("any.pth", {"noise": -1}, "flow.noise_std"),
        ("any.pth", {"noise": "nan"}, "flow.noise_std"),
        ("any name.pth", {"noise": 0.1}, "choose one with --name"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(put, tmp_path, name, options, words):
    with pytest.raises(rl.LabError, match=re.escape(words)) as told:
        import_tarflow(put(small_state(), name), tmp_path / "run", **options)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def without(*keys):
    return {key: value for key, value in small_state().items() if key not in keys}


BAD = {
    "an object": (pathlib.PurePosixPath("x"), "a pickled pathlib"),
    "a module": (torch.nn.Linear(2, 2), "a pickled torch.nn.modules.linear.Linear"),
    "a tensor": (torch.zeros(3), "is not a state dict: it holds Tensor"),
    "a list": ([torch.zeros(3)], "is not a state dict: it holds list"),
    "nothing": ({}, "is not a state dict"),
    "numbers for names": ({0: torch.zeros(2)}, "is not a state dict: 0 is Tensor"),
    "another model": (torch.nn.Linear(2, 2).state_dict(), "is no TARFlow checkpoint: it has no blocks.0.pos_embed"),
    "twice": (small_state() | {"module.var": torch.zeros(2)}, "twice"),
    "a flat table": (small_state() | {"blocks.0.pos_embed": torch.zeros(4)}, "blocks.0.pos_embed is (4,), a matrix"),
    "an empty table": (small_state() | {"blocks.0.pos_embed": torch.zeros(0, 64)}, "blocks.0.pos_embed is (0, 64)"),
    "no square": (small_state() | {"blocks.0.pos_embed": torch.zeros(5, 64)}, "5 tokens, which is no square"),
    "no patch": (small_state(size=10), "a token of 10 numbers is no square patch"),
    "outputs": (small_state() | {"blocks.0.proj_out.weight": torch.zeros(36, 64)}, "gives 36 numbers for a token of 12"),
    "no var": (without("var"), "has no var"),
    "no bias": (without("blocks.1.proj_in.bias"), "has no blocks.1.proj_in.bias"),
    "no class table": (without("blocks.1.class_embed"), "has no blocks.1.class_embed"),
    "a gap": ({key.replace("blocks.1.", "blocks.2."): v for key, v in small_state().items()}, "has no blocks.1.pos_embed"),
    "an extra": (small_state() | {"ema.decay": torch.ones(1)}, "holds ema.decay, which a TARFlow of its size does not have"),
    "no first classes": (without("blocks.0.class_embed"), "holds blocks.1.class_embed, which"),
    "a shape": (
        small_state() | {"blocks.1.attn_blocks.0.attention.qkv.weight": torch.zeros(64, 64)},
        "blocks.1.attn_blocks.0.attention.qkv.weight is (64, 64), the other tensors want (192, 64)",
    ),
    "classes": (small_state() | {"blocks.0.class_embed": torch.zeros(3, 64)}, "class_embed is (3, 64), the other"),
    "a variance": (small_state() | {"var": torch.full((4, 12), 2.0)}, "var, the variance of the noise, is not 1"),
    "no variance": (small_state(shift_only=True) | {"var": torch.zeros(4, 12)}, "is not above 0"),
    "nan": (small_state() | {"blocks.0.proj_in.bias": torch.full((64,), torch.nan)}, "proj_in.bias holds numbers that are not"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_tarflow_is_refused(put, tmp_path, what):
    content, words = BAD[what]
    path = put(content)
    with pytest.raises(rl.LabError, match=re.escape(words)) as told:
        import_tarflow(path, tmp_path / "run")
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_damaged_and_missing_files_and_a_taken_folder(put, tmp_path):
    path = put(small_state())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(damaged)
        with pytest.raises(rl.LabError, match=f"{re.escape(str(path))} (cannot be read|holds something other)"):
            import_tarflow(path, tmp_path / "run")
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(rl.LabError, match="there is no file"):
            import_tarflow(missing, tmp_path / "run")
    path.write_bytes(whole)
    for taken in (tmp_path, path):
        with pytest.raises(rl.LabError, match="exists and is not an empty folder"):
            import_tarflow(path, taken)
    (tmp_path / "run").mkdir()
    assert import_tarflow(path, tmp_path / "run").directory == tmp_path / "run"
    with pytest.raises(rl.LabError, match="exists and is not an empty folder"):
        import_tarflow(path, tmp_path / "run")
