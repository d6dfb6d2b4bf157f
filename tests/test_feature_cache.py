"""Features of the teacher that are computed once: in memory, on disk, mirrored views, the originals that a teacher sees."""

import numpy as np
import pytest
import torch
from test_training import encoder_reads, photos, train
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.target import Targets, TeacherTargets, check_grid
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data import cache
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import TensorImages
from rrepa_lab.data.originals import teacher_images
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError, LabWarning

SMALL = EncoderConfig(model="test_vit", weights="random", image_size=32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))


def images(n=9, channels=3):
    draw = torch.Generator().manual_seed(0)
    return TensorImages(torch.rand(n, channels, 8, 8, generator=draw) * 2 - 1, torch.arange(n) % 3, ["a", "b", "c"], 256)


@pytest.mark.parametrize("side", [1, 2, 4])  # the teacher's grid is 2x2: averaged, the same, interpolated
@pytest.mark.parametrize("disk", [False, True])
def test_a_table_holds_both_views(side, disk):
    split = images()
    targets, plain = Targets([Encoder(SMALL)], side), Targets([Encoder(SMALL)], side)
    targets.each[0].keep(split, 2, CPU, disk=disk)
    assert targets.each[0].teacher is None
    rows, mirrored = [4, 0, 7], torch.tensor([True, False, True])
    x = split.x[rows]
    expected = plain(torch.where(mirrored[:, None, None, None], x.flip(3), x))
    found = targets(torch.empty(0), rows, mirrored)
    assert found.dtype == torch.float32
    # float16 on disk: eleven bits of each number
    assert_close(found, expected, rtol=1e-3 if disk else 1e-5, atol=2e-3 if disk else 1e-5)
    assert not torch.allclose(expected, plain(x), atol=1e-3), "the views differ"
    kinds = [entry.kind for entry in cache.entries()]
    assert kinds == (["features"] if disk else [])


def test_the_table_on_disk_belongs_to_images_view_and_teacher():
    def folder(split=None, views=1, **settings):
        spec = TeacherTargets(Encoder(SMALL.override(settings)), 2).spec(split or images(), views)
        assert spec is not None
        return spec.folder

    other = images()
    other.x[0, 0, 0, 0] += 0.1
    found = [folder(), folder(views=2), folder(split=other), folder(layer=1), folder(weights="random:1"), folder(image_size=64)]
    assert len(set(found)) == len(found)
    assert folder() == found[0]


def test_a_training_with_flips_never_runs_the_teacher_again(tiny, tmp_path):
    config = tiny.override({"data.flip": True, "train.batch": 400})
    config = config.override({"train.steps": 12, "train.feature_cache": "disk"})
    with encoder_reads() as sizes:
        on_disk = train(config, tmp_path / "disk")
    assert sum(sizes) == 2 * 1437, "each view once"
    with encoder_reads() as sizes:
        again = train(config, tmp_path / "again")
    assert sizes == [], "another training finds them"
    with encoder_reads() as sizes:
        in_memory = train(config.override({"train.feature_cache": "memory"}), tmp_path / "memory")
    assert sum(sizes) == 2 * 1437
    anew = train(config.override({"train.feature_cache": "off"}), tmp_path / "anew")
    for one, two, three, four in zip(on_disk, again, in_memory, anew, strict=True):
        assert one.loss == two.loss
        assert three.loss == pytest.approx(four.loss, abs=1e-5)
        assert one.loss == pytest.approx(four.loss, abs=1e-4)


def test_features_on_disk_do_not_depend_on_the_precision_of_the_training(tiny, tmp_path):
    config = tiny.override({"train.batch": 400, "train.steps": 4, "train.feature_cache": "disk"})
    train(config.override({"train.precision": "bfloat16"}), tmp_path / "bfloat16")
    (entry,) = cache.entries()
    half = np.load(entry.folder / cache.ARRAY).copy()
    cache.remove(entry)
    train(config.override({"train.precision": "float32"}), tmp_path / "float32")
    assert np.array_equal(half, np.load(entry.folder / cache.ARRAY))


def test_the_old_number_is_read_with_a_hint():
    config = rl.preset("digits-reverse")
    with pytest.warns(LabWarning, match="feature_cache is a word now.*0 is read as off"):
        assert config.override({"train.feature_cache": 0}).train.feature_cache == "off"
    assert rl.load("digits-reverse").config.train.feature_cache == "auto"


def test_a_disk_without_room_is_a_note_and_an_error_where_it_was_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SPARE", 2**60)
    monkeypatch.setattr("rrepa_lab.training.inputs.FEATURE_MEMORY", 0)
    config = tiny.override({"train.batch": 400, "train.steps": 4})
    with pytest.warns(LabWarning, match="vit_tiny_patch16_224 runs in every step: its features take 3 MiB"):
        train(config, tmp_path / "auto")
    with pytest.raises(LabError, match="features needs .* MiB"):
        train(config.override({"train.feature_cache": "disk"}), tmp_path / "disk")


# --- the originals ----------------------------------------------------------------------------------------------------


def folder_config(root, size=8, **settings):
    return DataConfig(name="folder", path=str(root), image_size=size, channels=3, **settings)


def test_the_teacher_sees_the_same_rows_at_its_own_size(tmp_path):
    root = photos(tmp_path)
    config = folder_config(root, teacher_size=24)
    train_set = load_split(config, "train")
    shown = teacher_images(config, "train", train_set)
    large = load_split(folder_config(root, 24), "train")
    assert torch.equal(shown.__getitems__([3, 0]).x, large.__getitems__([3, 0]).x)
    part = limited(train_set, 4)
    assert torch.equal(teacher_images(config, "train", part).labels, part.labels)
    assert teacher_images(folder_config(root), "train", part) is part
    with pytest.raises(LabError, match="teacher_size is 24 and shift is 1"):
        DataConfig.from_dict(config.to_dict() | {"shift": 1})


@pytest.mark.parametrize("how", ["off", "memory", "disk"])
def test_training_and_instruments_show_the_teacher_its_originals(tiny, tmp_path, how):
    root = photos(tmp_path)
    teacher = {"encoder": SMALL.override({"channels": 1}).to_dict()}
    settings = {"data.name": "folder", "data.path": str(root), "data.teacher_size": 24, "data.flip": True, "flow.classes": 2}
    config = tiny.override({**settings, **teacher, "train.batch": 6, "train.steps": 8, "train.feature_cache": how})
    sizes = []

    def note(module, given, _):
        if isinstance(module, Encoder):
            sizes.append(tuple(given[0].shape[2:]))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        with pytest.warns(LabWarning, match="interpolated"):
            losses = [report.loss for report in rl.train(config, tmp_path / how, device="cpu")]
        run = rl.load(tmp_path / how)
        table = rl.similarity(run, taps=run.config.align.taps, metrics=["teacher_cosine"], images=rl.Images("train"))
        rl.teacher_floors(run, rl.Images("train"))
        rl.probe(run, run.config.align.taps, probes=["knn"], fit=rl.ProbeFit(neighbours=1))
        rl.gradient_ratio(run, batch=4, batches=1)
    finally:
        hook.remove()
    assert set(sizes) == {(24, 24)}
    assert table["other"].unique().tolist() == ["test_vit, random, sees originals of 24x24"]
    assert all(torch.tensor(losses).isfinite())
    assert "sees originals of 24x24" in (tmp_path / how / "card.md").read_text()


def test_a_teacher_of_one_patch_is_refused(tiny, tmp_path):
    teacher = EncoderConfig(model="test_vit", weights="random", image_size=16, channels=1)
    with pytest.raises(LabError, match="has 1x1 patches for the flow's 4x4 tokens.*larger encoder.image_size .now 16"):
        next(rl.train(tiny.model_copy(update={"encoder": teacher}), tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()
    check_grid(Encoder(teacher), 1)
