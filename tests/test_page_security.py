"""The page reads pictures that were uploaded to it, and no other file of the machine."""

import urllib.error
import urllib.request

import gradio as gr
import pytest
from gradio.data_classes import FileData, ImageData
from gradio.utils import get_upload_folder
from PIL import Image
from server.guard import trusted_hosts
from server.uploads import only_uploads, picture_field

MESSAGE = "The picture must be uploaded to this page."


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    folder = tmp_path / "uploads"
    (folder / "abc").mkdir(parents=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    assert get_upload_folder() == str(folder)
    Image.new("L", (8, 8), 200).save(folder / "abc" / "mine.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "secret.png")
    (folder / "abc" / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def outside(uploads):
    secret = uploads.parent / "secret.png"
    return {
        "a picture": str(secret), "no picture": "/etc/passwd", "missing": "/no/such/file.png", "relative": "secret.png",
        "up": str(uploads / "abc" / ".." / ".." / "secret.png"), "a link": str(uploads / "abc" / "link.png"),
        "a folder": str(uploads / "abc"), "the folder": str(uploads), "a device": "/dev/zero", "an address": "http://localhost/a.png",
        "nul": "a\0b", "empty": "",
    }  # fmt: skip


def test_an_uploaded_picture_is_read(uploads):
    picture = picture_field().preprocess(ImageData(path=str(uploads / "abc" / "mine.png")))
    assert picture.size == (8, 8)


@pytest.mark.parametrize("name", outside(__import__("pathlib").Path("/nowhere")))
def test_no_other_file_is_read_and_nothing_is_said_about_it(uploads, name):
    path = outside(uploads)[name]
    with pytest.raises(gr.Error) as caught:
        picture_field().preprocess(ImageData(path=path, orig_name="mine.png", url="http://127.0.0.1/mine.png"))
    assert caught.value.message == MESSAGE


def test_an_address_alone_is_not_fetched(uploads):
    with pytest.raises(gr.Error) as caught:
        picture_field().preprocess(ImageData(url="http://127.0.0.1:9/picture.png"))
    assert caught.value.message == MESSAGE


@pytest.mark.parametrize("place", ["background", "layers", "composite"])
def test_the_parts_of_a_drawing_are_uploads_too(uploads, place):
    pad = only_uploads(gr.Sketchpad())
    file = FileData(path=str(uploads.parent / "secret.png"))
    parts = {"background": None, "layers": [], "composite": None} | {place: [file] if place == "layers" else file}
    with pytest.raises(gr.Error) as caught:
        pad.preprocess(pad.data_model(**parts))
    assert caught.value.message == MESSAGE


@pytest.mark.parametrize("path", ["/etc/passwd", "/no/such/file.png"])
def test_the_endpoint_answers_alike_for_files_that_exist_and_that_do_not(page, path):
    import json

    data = json.dumps({"data": ["digits-reverse", {"path": path}, "gradient"]}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{page}/gradio_api/call/classify", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{page}/gradio_api/call/classify/{event}", timeout=60) as stream:
        text = stream.read().decode()
    assert "event: error" in text
    assert path not in text
    assert MESSAGE in text


# --- names and origins ------------------------------------------------------------------------------------------------


def answered(page, host=None, origin=None, data=None):
    """The status of a request with these headers."""
    headers = {"Content-Type": "text/plain"} | ({"Host": host} if host else {}) | ({"Origin": origin} if origin else {})
    request = urllib.request.Request(f"{page}{'/gradio_api/call/runs' if data else '/'}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", ""])
def test_a_page_of_this_machine_answers_to_no_other_name(page, host):
    assert answered(page, host=host or " ") == 400


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_it_answers_to_the_names_of_the_loopback(page, host):
    assert answered(page, host=host) == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1.evil.example", "null"])
def test_a_page_of_another_site_cannot_start_anything(page, origin):
    assert answered(page, origin=origin, data=b'{"data": []}') == 403


def test_its_own_page_can(page):
    assert answered(page, origin=page, data=b'{"data": []}') not in (400, 403)


@pytest.mark.parametrize(
    ("host", "share", "allowed", "expected"),
    [
        ("127.0.0.1", False, [], {"localhost", "127.0.0.1", "::1", "[::1]"}),
        ("localhost", False, ["lab.local"], {"localhost", "127.0.0.1", "::1", "[::1]", "lab.local"}),
        ("0.0.0.0", False, [], {"*"}), ("127.0.0.1", True, [], {"*"}),
        ("10.0.0.7", False, ["lab.local"], {"localhost", "127.0.0.1", "::1", "[::1]", "10.0.0.7", "lab.local"}),
    ],
)  # fmt: skip
def test_which_names_are_trusted(host, share, allowed, expected):
    assert set(trusted_hosts(host, share, allowed)) == expected


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["picture", "pad"])
def test_a_small_file_of_many_pixels_is_refused_by_its_header(uploads, field):
    path = uploads / "abc" / "large.png"
    Image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 200_000
    if field == "picture":
        component, payload = picture_field(), ImageData(path=str(path))
    else:
        component = only_uploads(gr.Sketchpad())
        payload = component.data_model(background=None, layers=[FileData(path=str(path))], composite=None)
    with pytest.raises(gr.Error, match="is too large: pictures may have up to 20 megapixels"):
        component.preprocess(payload)
