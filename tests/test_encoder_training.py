"""Small encoders trained without labels: the views of an image, the recipes by data set, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.cli import main
from rrepa_lab.cli.arguments import parse_setting
from rrepa_lab.cli.encoder import align_command
from rrepa_lab.data.augment import PHOTO_VIEWS, Views, random_view
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.splits import load_split
from rrepa_lab.paths import assets
from rrepa_lab.training.selfsup import EncoderTrainConfig, encoder_recipe, nt_xent, read_encoder, train_encoder

PLAIN = Views(degrees=0, shift=0, scale=0, shear=0, noise_std=0)  # every change left out
SIZE, SHAPES = 16, ("airplane", "bird", "cat")  # names of CIFAR-10, so that the folder can be read under that name too


def drawing(kind: int, draw: np.random.Generator) -> np.ndarray:
    """Stripes either way or squares, at a random offset, in two random colours, with noise: (16, 16, 3) uint8."""
    rows, columns = np.indices((SIZE, SIZE)) + draw.integers(0, 12, 2)[:, None, None]
    mask = (rows // 3 % 2, columns // 3 % 2, (rows // 3 + columns // 3) % 2)[kind]
    colours = draw.integers(0, 256, (2, 3))
    while abs(colours[0] - colours[1]).max() < 50:
        colours = draw.integers(0, 256, (2, 3))
    return (np.where(mask[..., None], *colours) + draw.integers(-20, 20, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 40 test pictures of each of three patterns, in train/<class> and test/<class>."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in {"train": 40, "test": 40}.items():
        for kind, name in enumerate(SHAPES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(drawing(kind, draw)).save(root / split / name / f"{number}.png")
    return root


def recipe(photos: Path, **settings: object) -> EncoderTrainConfig:
    data = DataConfig(name="folder", path=str(photos), image_size=SIZE, channels=3)
    return encoder_recipe(data).override({"steps": 40, "batch": 48, **settings})


def train(config: EncoderTrainConfig, out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    list(train_encoder(config, out))
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def encoder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of these pictures as a set called cifar10, by the command line."""
    out = tmp_path_factory.mktemp("encoder") / "textures"
    settings = ["--set", "steps=80", "--set", "batch=48", "--set", "lr=0.004", "--set", f"data.path={photos}"]
    assert main(["encoder", "train", "--data", "cifar10", "--size", str(SIZE), "--out", str(out), *settings, "--json"]) == 0
    return out


def test_it_beats_raw_pixels_and_an_untrained_encoder(encoder):
    scores = {row["features"]: row["knn_accuracy"] for row in read_encoder(encoder).scores}
    assert scores["encoder"] > scores["raw pixels"] + 0.05
    assert scores["encoder"] > scores["untrained encoder"] + 0.05
    assert scores["encoder, layer 3"] > scores["raw pixels"] + 0.05


def test_the_folder_says_what_it_is(encoder, photos):
    about = read_encoder(encoder)
    data = about.data
    assert (data.name, data.path, about.images) == ("cifar10", str(photos), 120)
    assert about.fingerprint == load_split(data, "train").fingerprint
    assert about.scores[0]["n_test"] == 120
    card = (encoder / "card.md").read_text()
    for words in (about.fingerprint, "80 steps of 48 images", "crop 0.2", "train all 120; test all 120", "resnet10t"):
        assert words in card, words


def test_scores_of_the_command_are_those_on_file(encoder, capsys):
    assert main(["encoder", "score", str(encoder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_encoder(encoder).scores


def test_weights_depend_on_the_seed_alone(photos, tmp_path):
    first = train(recipe(photos, steps=3), tmp_path / "a")
    torch.rand(7)  # the global random state does not matter
    again = train(recipe(photos, steps=3), tmp_path / "b")
    other = train(recipe(photos, steps=3, seed=1), tmp_path / "c")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_statistics_of_batch_normalization_are_learnt_and_kept(photos, tmp_path):
    weights = train(recipe(photos, steps=3), tmp_path / "a")
    assert int(weights["bn1.num_batches_tracked"]) == 3
    assert not torch.equal(weights["bn1.running_mean"], torch.zeros_like(weights["bn1.running_mean"]))


def test_digits_are_trained_as_the_bundled_encoder_was(tmp_path):
    reports = list(train_encoder(EncoderTrainConfig().override({"steps": 3, "batch": 64}), tmp_path / "digits"))
    assert [report.loss for report in reports] == pytest.approx([4.807932, 4.756946, 4.745880], rel=1e-4)
    assert encoder_recipe(DataConfig()) == EncoderTrainConfig()
    bundled = read_encoder(assets() / "encoders" / "digits")
    assert bundled.recipe == EncoderTrainConfig()


def test_images_without_classes_are_trained_on_and_not_scored(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(drawing(0, draw)).save(tmp_path / "photos" / split / f"{number}.png")
    words = ["--size", "16", "--set", "steps=1", "--set", "batch=8"]
    out = tmp_path / "encoder"
    assert main(["encoder", "train", "--data", str(tmp_path / "photos"), "--out", str(out), *words]) == 0
    assert "the images have no classes" in (out / "card.md").read_text()


def test_a_flow_is_aligned_on_the_same_grid(encoder, photos, tmp_path, capsys):
    words = {"data.path": photos, "data.image_size": SIZE, "flow.image_size": SIZE, "flow.width": 16, "flow.head_width": 16,
             "flow.blocks": 2, "flow.layers": 2, "train.steps": 2, "train.batch": 16, "data.holdout": 0.1}  # fmt: skip
    settings = [part for key, value in words.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "cifar10-tiny-reverse", "--encoder", str(encoder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, *settings]) == 0
    run = rl.load(tmp_path / "run")
    assert run.encoder().grid == (SIZE // 4, SIZE // 4)
    assert run.config.flow.side == SIZE // 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data", "mnist", "--set", "views.hue=0.1"],
            "views.saturation, hue and grey change colours, and data.channels is 1",
        ),
        (["--data", "nowhere"], "no image folder at"),
        (["--data", "cifar10", "--size", "18"], "an image size that 4 divides, 16 or more, not 18"),
        (["--data", "fashion-mnist", "--size", "28"], "an image size that 8 divides, not 28"),
        (["--data", "cifar10", "--set", "data.path=nowhere"], "cifar10: there is nothing of it at"),
        (["--data", "cifar10", "--out", "file/encoder"], "cannot be written"),
        (["--data", "cifar10", "--out", "full"], "full already holds an encoder: choose another --out"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("")
    assert main(["encoder", "train", "--out", "encoder", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "encoder").exists()


def test_recipes_by_data_set():
    colour = encoder_recipe(DataConfig(name="cifar10", image_size=32, channels=3))
    assert Encoder(colour.encoder).grid == (8, 8)
    assert colour.views == PHOTO_VIEWS
    large = encoder_recipe(DataConfig(name="stl10", image_size=64, channels=3))
    assert Encoder(large.encoder).grid == (8, 8)
    grey = encoder_recipe(DataConfig(name="mnist", image_size=32, channels=1))
    assert Encoder(grey.encoder).grid == (8, 8)
    assert (grey.views, grey.encoder.channels) == (Views(), 1)


def test_another_model_takes_its_own_arguments_and_last_layer(photos, tmp_path):
    out = tmp_path / "encoder"
    settings = ["steps=1", "batch=8", "encoder.model=resnet10t", "encoder.image_size=64"]
    words = [part for setting in settings for part in ("--set", setting)]
    assert main(["encoder", "train", "--data", str(photos), "--size", str(SIZE), "--out", str(out), *words, "--json"]) == 0
    assert Encoder(read_encoder(out).encoder.override({"weights": str(out / "model.safetensors")})).grid == (2, 2)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (DataConfig(), "digits-reverse"),
        (DataConfig(name="cifar10", path="cifar", image_size=32, channels=3), "cifar10-tiny-reverse"),
        (DataConfig(name="folder", path="photos", image_size=64, channels=3), "tinyimagenet-tiny-reverse"),
        (DataConfig(name="folder", path="photos", image_size=32, channels=3), "imagefolder-tiny-reverse"),
        (DataConfig(name="cifar100", path="cifar", image_size=24, channels=3), "imagefolder-tiny-reverse"),
        (DataConfig(name="mnist", path="mnist", image_size=32, channels=1), "imagefolder-tiny-reverse"),
    ],
)
def test_the_hint_names_a_preset_and_the_settings_that_fit_the_pictures(data, name):
    words = align_command("here", encoder_recipe(data)).partition("rrepa-lab train ")[2].split()
    settings = dict(map(parse_setting, words[words.index("here") + 2 :: 2]))
    config = rl.preset(words[0]).override(settings)
    assert words[0] == name
    assert (config.data.name, config.data.path, config.data.image_size) == (data.name, data.path, data.image_size)
    assert (config.flow.image_size, config.flow.channels, config.data.channels) == (
        data.image_size,
        data.channels,
        data.channels,
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5  # away from the limits of clipping


def luma(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)


def test_views_that_are_all_off_are_the_images(x):
    assert torch.equal(random_view(x, PLAIN, generator(0)), x)


def test_views_depend_on_their_generator_and_differ_between_images(x):
    same = x[:1].expand(4, -1, -1, -1)
    first = random_view(same, PHOTO_VIEWS, generator(0, 1))
    assert torch.equal(first, random_view(same, PHOTO_VIEWS, generator(0, 1)))
    assert not torch.equal(first, random_view(same, PHOTO_VIEWS, generator(0, 2)))
    assert all(not torch.equal(first[0], other) for other in first[1:])
    assert first.abs().max() <= 1


def test_mirrored_views(x):
    assert_close(random_view(x, PLAIN.override({"flip": 1}), generator(0)), x.flip(3), atol=1e-5, rtol=0)
    half = random_view(x, PLAIN.override({"flip": 0.5}), generator(0))
    mirrored = [bool(torch.allclose(one, image.flip(2), atol=1e-5)) for one, image in zip(half, x, strict=True)]
    plain = [bool(torch.allclose(one, image, atol=1e-5)) for one, image in zip(half, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True))
    assert 16 < sum(mirrored) < 48


def test_crops_show_a_part_of_the_image_without_its_outside():
    """On a horizontal ramp the range of a view is the width of its crop; nothing of the outside (-1) comes in."""
    ramp = torch.linspace(0, 1, 32).expand(256, 3, 32, 32)
    seen = random_view(ramp, PLAIN.override({"crop": 0.25}), generator(0))
    inner = seen[:, 0, 2:-2, 2:-2]  # nearer to the border half a pixel of the outside is blended in
    widths = (inner[:, 0, -1] - inner[:, 0, 0]) * 31 / 27
    assert inner.min() >= 0
    assert widths.min() > 0.5 / (4 / 3) ** 0.5 - 0.05  # the narrowest crop: a quarter of the area, 3:4
    assert widths.min() < 0.55
    assert widths.max() > 0.95


def test_colours_keep_what_they_should(x):
    turned = random_view(x, PLAIN.override({"hue": 0.1, "jitter": 1}), generator(0))
    assert_close(luma(turned), luma(x), atol=1e-3, rtol=0)
    assert (turned - x).abs().mean() > 0.02
    grey = random_view(x, PLAIN.override({"grey": 1}), generator(0))
    assert_close(grey, luma(x)[:, None].expand(-1, 3, -1, -1), atol=1e-3, rtol=0)
    bright = random_view(x, PLAIN.override({"brightness": 0.2, "jitter": 1}), generator(0))
    factors = (bright + 1) / (x + 1)
    assert_close(factors, factors[:, :1, :1, :1].expand_as(x))
    assert 0.8 <= factors.min() < 0.85
    assert 1.15 < factors.max() <= 1.2001
    contrast = random_view(x, PLAIN.override({"contrast": 0.2, "jitter": 1}), generator(0))
    assert_close(luma(contrast).mean(dim=(1, 2)), luma(x).mean(dim=(1, 2)))
    spread = contrast.std(dim=(1, 2, 3)) / x.std(dim=(1, 2, 3))
    assert 0.75 < spread.min() < 0.9
    assert 1.1 < spread.max() < 1.25
    some = random_view(x, PLAIN.override({"hue": 0.3, "jitter": 0.5}), generator(0))
    unchanged = (some - x).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert 16 < int(unchanged.sum()) < 48


def test_the_decoupled_loss_leaves_the_partner_out():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2) / 0.5
    expected, decoupled = [], []
    for row in range(6):
        partner = (row + 3) % 6
        others = [cosine[row, column].exp() for column in range(6) if column not in (row, partner)]
        decoupled.append(torch.stack(others).sum().log() - cosine[row, partner])
        expected.append((torch.stack(others).sum() + cosine[row, partner].exp()).log() - cosine[row, partner])
    assert_close(nt_xent(features, 0.5), torch.stack(expected).mean())
    assert_close(nt_xent(features, 0.5, decoupled=True), torch.stack(decoupled).mean())
