"""A picture of a digit is prepared in one place, for the page, its endpoints and the command line alike."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.data.prepare import as_digit, prepare
from rrepa_lab.viz.images import picture


@pytest.fixture(scope="module")
def five(printed):
    return printed(5)


def test_a_printed_digit_is_read_alike_whatever_its_paper_and_place(five):
    white = as_digit(five).x
    assert white.shape == (1, 1, 8, 8)
    shifted = Image.new("RGB", (400, 300), "white")
    shifted.paste(five.resize((100, 100), Image.Resampling.LANCZOS), (250, 20))
    grey = Image.fromarray((np.asarray(five) * 0.5 + 90).astype(np.uint8))
    others = {
        "on black": Image.eval(five, lambda value: 255 - value), "in a corner": shifted, "on grey": grey,
        "in colour": Image.merge("RGB", [five.convert("L"), five.convert("L"), Image.new("L", five.size, 255)]),
    }  # fmt: skip
    for name, other in others.items():
        assert (as_digit(other).x - white).abs().mean() < 0.12, name
    assert as_digit(five).how == "inverted to light on dark and cropped to the digit"
    assert as_digit(others["on black"]).how == "cropped to the digit"


def test_a_digit_of_the_data_is_taken_as_it_comes():
    x = rl.load("digits-none").data("test", 50).x
    for image in x:
        for scale in (1, 4):
            made = as_digit(picture(image, scale=scale))
            assert made.how == ""
            assert_close(made.x[0], image, atol=0.01, rtol=0)


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_a_picture_of_one_colour_is_only_averaged(colour):
    flat = Image.new("L", (40, 40), colour)
    made = as_digit(flat)
    assert torch.equal(made.x, from_picture(flat, 1, 8))
    assert made.how == ""


def test_other_data_are_cropped_to_the_centre(five):
    made = prepare(five, DataConfig(name="folder", image_size=16, channels=3))
    assert torch.equal(made.x, from_picture(five, 3, 16))


def test_command_line_and_endpoint_give_the_scores_of_the_library(capsys, client, tmp_path, five):
    from gradio_client import handle_file

    five.save(tmp_path / "five.png")
    run = rl.load("digits-reverse")
    expected = rl.classify(run, as_digit(five).x)
    assert run.classes[int(expected.label)] == "5"
    assert main(["classify", "digits-reverse", str(tmp_path / "five.png"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["prepared"] == "inverted to light on dark and cropped to the digit"
    answer = client.predict(
        run="digits-reverse", image=handle_file(str(tmp_path / "five.png")), method="gradient", api_name="/classify"
    )
    for scores in (row["scores"], answer["scores"]):
        assert list(scores.values()) == pytest.approx(expected.scores[0].tolist(), abs=1e-3)
    assert answer["prepared"] == row["prepared"]
