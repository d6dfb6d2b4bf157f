"""Files in ADM's layout, and the Inception network with random weights of the true class."""

import json
import zipfile

import numpy as np
import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.evaluation.adm import AdmFile, picture_writer, write_statistics
from rrepa_lab.evaluation.collect import collect
from rrepa_lab.evaluation.distances import frechet_distance
from rrepa_lab.evaluation.moments import gaussian_of
from rrepa_lab.evaluation.networks.contract import spatial_part
from rrepa_lab.evaluation.networks.inception import FILE, URL, Inception, find_weights
from rrepa_lab.evaluation.pictures import FilePictures, FolderPictures, TensorPictures
from rrepa_lab.evaluation.protocols import PROTOCOLS, Chosen, choose
from rrepa_lab.evaluation.reference import find_reference
from rrepa_lab.evaluation.scores import score_pictures


def pictures(n=12, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- files ------------------------------------------------------------------------------------------------------------


def test_pictures_that_are_written_are_read_back(tmp_path):
    x, labels, path = pictures(), torch.arange(12) % 3, tmp_path / "samples.npz"
    with picture_writer(path, 12, (3, 16, 16), labels) as write:
        for part in x.split(5):
            write(part)
    with np.load(path) as plain:  # as ADM's evaluator reads it
        assert plain["arr_0"].dtype == np.uint8
        assert plain["arr_0"].shape == (12, 16, 16, 3)
        assert np.array_equal(plain["arr_0"], x.permute(0, 2, 3, 1).numpy())
        assert plain["arr_1"].tolist() == labels.tolist()
    found = FilePictures(AdmFile(path))
    assert isinstance(found.x, np.memmap), "pictures of a file that is not compressed are not read into memory"
    assert torch.equal(found.batch(torch.tensor([3, 0, 11])), x[[3, 0, 11]])
    assert torch.equal(found.labels, labels)
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_others_are_read(tmp_path, save):
    x, path = pictures(), tmp_path / "others.npz"
    save(path, x.permute(0, 2, 3, 1).numpy())  # positional: arr_0
    assert torch.equal(FilePictures(AdmFile(path)).batch(torch.arange(12)), x)


def test_grey_pictures_are_written_in_three_channels(tmp_path):
    path = tmp_path / "grey.npz"
    with picture_writer(path, 2, (1, 8, 8), None) as write:
        write(torch.full((2, 1, 8, 8), 7, dtype=torch.uint8))
    assert AdmFile(path).arrays["arr_0"][0] == (2, 8, 8, 3)
    assert "arr_1" not in AdmFile(path).arrays


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path):
    path = tmp_path / "samples.npz"

    def interrupted(error):
        with picture_writer(path, 12, (3, 16, 16), None) as write:
            write(pictures(4))
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted(KeyboardInterrupt)
    with pytest.raises(LabError, match="4 of 12 pictures were written"):
        interrupted(None)
    assert not list(tmp_path.iterdir())


def test_statistics_have_the_names_of_adm(tmp_path):
    x, path = torch.randn(50, 6, dtype=torch.float64), tmp_path / "reference.npz"
    pooled, spatial = gaussian_of(x), gaussian_of(x[:, :4])
    write_statistics(path, pooled, spatial, "inception", "1234")
    with np.load(path, allow_pickle=False) as plain:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(plain.files)
        assert np.array_equal(plain["sigma"], pooled.covariance)
    found = AdmFile(path)
    assert found.statistics().n == 50
    assert np.array_equal(found.statistics(spatial=True).mean, spatial.mean)
    assert found.network == ("inception", "1234")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "holds x, and neither pictures"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "pictures are .n, H, W, 3. uint8"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "pictures are .n, H, W, 3. uint8"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "Python objects, which are not read"),
    ],
)
def test_files_that_hold_something_else(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(LabError, match=message):
        AdmFile(path)


def test_files_that_are_damaged(tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(LabError, match="is not a .npz file that can be read"):
        AdmFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(LabError, match="is not a .npz file that can be read"):
        AdmFile(path)
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.zeros(5, int))
    with pytest.raises(LabError, match="arr_1 is .5,., and there are 4 pictures"):
        FilePictures(AdmFile(path))
    np.savez(path, mu=np.zeros(4), sigma=np.zeros((3, 3)))
    with pytest.raises(LabError, match="does not go with a covariance"):
        AdmFile(path).statistics()


def test_folders_are_read_in_the_order_of_names(tmp_path):
    from PIL import Image

    x = pictures(3)
    for name, picture in zip(("b.png", "a.png", "c/d.png"), x, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name)
    found = FolderPictures(tmp_path)
    assert found.files == ["a.png", "b.png", "c/d.png"]
    assert torch.equal(found.batch(torch.arange(3)), x[[1, 0, 2]])
    Image.new("RGB", (9, 9)).save(tmp_path / "e.png")
    with pytest.raises(LabError, match="pictures of several sizes .16x16 and 9x9, e.png."):
        FolderPictures(tmp_path).batch(torch.arange(4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match="holds no pictures"):
        FolderPictures(tmp_path / "empty")


def test_describe_says_what_a_file_holds(tmp_path, capsys):
    path = tmp_path / "samples.npz"
    with picture_writer(path, 12, (3, 16, 16), torch.arange(12) % 3) as write:
        write(pictures())
    assert main(["data", "describe", str(path)]) == 0
    text = capsys.readouterr().out
    assert "12 of 3x16x16, uint8 (arr_0)" in text
    assert "3 classes, 4 to 4 pictures in a class (arr_1)" in text
    write_statistics(path, gaussian_of(torch.randn(9, 4)), None, "digits", "ab12")
    assert main(["data", "describe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"] == "mean and covariance of 4 features of digits (ab12), 9 pictures"


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of torch-fidelity's own class."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / FILE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        model = extractor.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return Inception(weights)


def test_hooks_deliver_what_sfid_is_defined_on(inception):
    held = {}
    handle = inception.model.Mixed_6d.register_forward_hook(lambda _, __, out: held.update(block=out))
    x = pictures(3, 24)
    found = inception(x)
    handle.remove()
    whole = held["block"]
    assert whole.shape == (3, 768, 17, 17)
    branch = inception.model.Mixed_6d.branch1x1
    assert branch.conv.out_channels == 192
    assert torch.equal(found.spatial, spatial_part(whole[:, :192])), "branch1x1 is the first 192 channels of Mixed_6d"
    assert found.spatial.shape == (3, 2023) == (3, inception.spatial_dim)
    assert torch.equal(found.spatial.view(3, 17, 17, 7)[1, 2, 3], whole[1, :7, 2, 3]), "rows, columns, then channels"
    assert found.pooled.shape == (3, 2048)
    assert found.logits.shape == (3, 1008)
    bias = inception.model.fc.bias
    assert torch.allclose(found.logits + bias, inception.model.fc(found.pooled), atol=1e-5), "without bias"


def test_inception_takes_bytes_by_truncation(inception):
    x = pictures(2, 24)
    floats = (x.float() + 0.9) / 127.5 - 1  # 0.9 of a level above: truncation gives the level back
    assert torch.equal(inception(floats).pooled, inception(x).pooled)


@pytest.mark.parametrize("batch", [1, 64])
def test_features_do_not_depend_on_the_batch(inception, batch):
    x = TensorPictures(pictures(5, 24))
    (expected,), (found,) = (collect(x, [inception], batch=size) for size in (5, batch))
    scale = float(expected.features.abs().max())
    assert torch.allclose(found.features, expected.features, atol=1e-5 * scale)
    assert np.allclose(found.spatial.mean, expected.spatial.mean, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_protocol_adm_on_files(inception, tmp_path):
    """A reference and samples as files: the numbers are those of the features, and of torchmetrics where it agrees."""
    real, fake = pictures(10, 24, 1), pictures(8, 24, 2)
    chosen = Chosen(PROTOCOLS["adm"], inception)
    reference = tmp_path / "reference.npz"
    rl.save_reference(reference, real, chosen)
    with picture_writer(tmp_path / "samples.npz", 8, (3, 24, 24), None) as write:
        write(fake)
    samples = FilePictures(AdmFile(tmp_path / "samples.npz"))
    with pytest.warns(LabWarning) as met:
        (scored,) = score_pictures(samples, [(chosen, find_reference(reference))], intervals=False)
    rows = {row["metric"]: row["value"] for row in scored.rows}
    assert list(rows) == ["FID[adm]", "sFID[adm]", "IS[adm]"]
    texts = [str(one.message) for one in met]
    assert any("FID[adm] of 8 samples and 2048 features" in text for text in texts)
    assert any("precision and recall[adm] left out: the reference holds statistics and no pictures" in text for text in texts)
    a, b = inception(fake), inception(real)
    assert rows["FID[adm]"] == pytest.approx(frechet_distance(a.pooled, b.pooled), rel=1e-6)
    assert rows["sFID[adm]"] == pytest.approx(frechet_distance(a.spatial, b.spatial), rel=1e-6)
    assert {row["n_reference"] for row in scored.rows} == {10}
    with pytest.warns(LabWarning, match="singular"):
        table = score_pictures(samples, [(chosen, find_reference(real))], intervals=False)[0].rows
    assert {"precision[adm]", "recall[adm]"} <= {row["metric"] for row in table}, "with pictures they can be measured"


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.filterwarnings("ignore:Metric `.*` will save all extracted features")
def test_the_same_as_torchmetrics_on_the_same_features(inception):
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    isc = pytest.importorskip("torchmetrics.image.inception")
    from rrepa_lab.evaluation.distances import inception_score, kernel_distance

    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 16, generator=draws), torch.randn(400, 16, generator=draws) * 1.5 + 0.3

    class Given(torch.nn.Module):
        """Features that stand for pictures: the metric is fed these."""

        num_features = 16

        def forward(self, x):
            return x[:, 0, 0, :16]

    def fed(x):
        return x[:, None, None, :].expand(-1, 3, 4, -1)

    metric = fid.FrechetInceptionDistance(feature=Given(), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(fed(b).double(), real=True)
    metric.update(fed(a).double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)
    distance = kid.KernelInceptionDistance(feature=Given(), subsets=1, subset_size=300)
    same = b[:300]
    distance.update(fed(same), real=True)
    distance.update(fed(a), real=False)
    assert kernel_distance(a, same).value == pytest.approx(float(distance.compute()[0]), rel=1e-3, abs=1e-5)
    score = isc.InceptionScore(feature=Given(), splits=1)
    score.update(fed(a))
    assert inception_score(a.double().log_softmax(dim=1)).value == pytest.approx(float(score.compute()[0]), rel=1e-5)


def test_missing_weights_say_what_to_download_and_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path))
    monkeypatch.delenv("RREPA_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(LabError) as caught:
        choose("adm")
    assert URL in str(caught.value)
    assert str(tmp_path / FILE) in str(caught.value)
    monkeypatch.setenv("RREPA_INCEPTION", str(tmp_path / "mine.pth"))
    with pytest.raises(LabError, match=r"there is none at .*mine.pth"):
        choose("adm")
    torch.save({"x": torch.zeros(2)}, tmp_path / "mine.pth")
    assert find_weights() == tmp_path / "mine.pth"
    with pytest.raises(LabError, match="does not hold the weights of Inception"):
        choose("adm")
    (tmp_path / "mine.pth").write_bytes(b"no weights")
    with pytest.raises(LabError, match="cannot be read as weights"):
        choose("adm")


def test_weights_that_are_not_the_published_ones_are_named(inception):
    assert inception.words.startswith("InceptionV3 2015-12-05, other weights")
    assert len(inception.sha256) == 16


def test_a_reference_of_another_network_is_refused(inception, tmp_path):
    path, chosen = tmp_path / "reference.npz", Chosen(PROTOCOLS["adm"], inception)
    statistics = gaussian_of(torch.randn(20, 64))
    write_statistics(path, statistics, None, "digits", "ab12")
    with pytest.raises(LabError, match="holds statistics of digits .ab12., and the samples are read by inception"):
        score_pictures(TensorPictures(pictures(4)), [(chosen, find_reference(path))])
    x = pictures(70, 8)
    digits = choose("digits")[0]
    grey = x[:, :1].expand(-1, 3, -1, -1)
    np.savez(tmp_path / "both.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=grey.permute(0, 2, 3, 1).numpy())
    (by_pictures,) = score_pictures(TensorPictures(x[:, :1]), [(digits, find_reference(tmp_path / "both.npz"))])
    assert by_pictures.rows[0]["value"] == pytest.approx(0, abs=1e-6), "its pictures are read by the other network"
    np.savez(path, mu=statistics.mean, sigma=statistics.covariance)
    with pytest.raises(LabError, match="holds statistics of 64 features, and inception has 2048 and 2023"):
        score_pictures(TensorPictures(pictures(4)), [(chosen, find_reference(path))])


@pytest.mark.slow
def test_protocols_in_one_call_from_the_command_line(weights, tmp_path, monkeypatch, capsys):
    """A run without a published reference: adm says that it needs one; a split stands in when it is named."""
    monkeypatch.setenv("RREPA_INCEPTION", str(weights))
    words = ["evaluate", "digits-none", "--parts", "samples", "--samples", "6", "--protocol", "adm"]
    assert main(words) == 2
    assert "protocol adm compares with a published file: --reference VIRTUAL_imagenet64_labeled.npz" in capsys.readouterr().err
    assert main(["evaluate", "--samples", str(tmp_path)]) == 2
    assert "needs something to compare with: add --reference FILE.npz" in capsys.readouterr().err
    reference, made = tmp_path / "reference.npz", tmp_path / "made.npz"
    x = pictures(6, 12)
    np.savez(tmp_path / "real.npz", x.permute(0, 2, 3, 1).numpy())
    saving = ["evaluate", "--reference", str(tmp_path / "real.npz"), "--save-reference", str(reference)]
    assert main(saving) == 0
    assert "InceptionV3" in capsys.readouterr().out
    assert main([*words, "--reference", str(reference), "--save-samples", str(made), "--json"]) == 0
    out, notes = capsys.readouterr()
    assert "note: FID[adm] of 6 samples and 2048 features" in notes
    table = json.loads(out)
    assert {row["metric"] for row in table} == {"FID[adm]", "sFID[adm]", "IS[adm]"}
    assert main(["evaluate", "--samples", str(made), "--reference", str(reference), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for one, other in zip(table, again, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-6), "the saved bytes are those that were scored"
