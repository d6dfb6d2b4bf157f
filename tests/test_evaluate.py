"""`rl.evaluate` and what belongs to it on runs: parts, intervals, files, nearest training images, sweeps, published numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from golden.flows import small_run

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.evaluation.adm import AdmFile, picture_writer
from rrepa_lab.evaluation.collect import collect
from rrepa_lab.evaluation.correct import label_ranks
from rrepa_lab.evaluation.networks.bundled import BundledEvaluator
from rrepa_lab.evaluation.networks.contract import to_bytes, to_floats
from rrepa_lab.evaluation.paper import ALIASES, paper_findings, paper_tables
from rrepa_lab.evaluation.pictures import TensorPictures
from rrepa_lab.evaluation.reference import find_reference, split_reference
from rrepa_lab.evaluation.run_samples import RunSamples
from rrepa_lab.evaluation.sample_labels import mean_spread
from rrepa_lab.measurements.compare import Finding, tabulate
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.measurements.results import measurements
from rrepa_lab.measurements.schema import check

ALL = [
    "nats_per_dim", "gradient_accuracy", "iterated_accuracy", "bayes_accuracy", "linear_accuracy", "FD[digits]", "sFD[digits]",
    "KD[digits]", "precision[digits]", "recall[digits]", "Vendi[digits]", "real Vendi[digits]", "label_agreement",
    "class_diversity", "nearest_train_distance", "held_out_train_distance", "closer_than_held_out",
]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return rl.load("digits-reverse")


@pytest.fixture(scope="module")
def table(run):
    """Everything that can be measured of a run, on few images."""
    return rl.evaluate(run, samples=100, limit=60, n_noise_samples=1, parts="all")


def test_all_parts_in_one_call(table):
    assert table["metric"].tolist() == ALL
    check(table)
    assert table["value"].notna().all()
    for row in table.to_dict("records"):
        assert row["unit"] == metric_of(row["metric"]).unit, row["metric"]
        assert row["protocol"], row["metric"]
    known = table.set_index("metric")
    held = known[known["low"].notna()]
    assert (held["low"] <= held["value"]).all()
    assert (held["value"] <= held["high"]).all()
    assert held["interval"].str.contains("95 % over (?:images|samples), ").all(), "never over training seeds"
    assert {"nats_per_dim", "bayes_accuracy", "FD[digits]", "KD[digits]", "precision[digits]"} <= set(held.index)


def test_the_layer_of_the_probe_is_chosen_on_validation_images(run, table):
    row = table.set_index("metric").loc["linear_accuracy"]
    assert "best of all layers on val;" in row["protocol"]
    by_hand = rl.probe(
        run, probes=["linear"], baselines=False, limit=60, data={"train": run.images("train"), "test": run.images("val")}
    )
    assert rl.best_layer(by_hand).iloc[0]["tap"] == row["best_tap"]
    found = rl.evaluate(_without_validation(), samples=0, limit=60, parts="probe").iloc[0]
    assert "best of all layers on test, the scored images themselves, which flatters" in found["protocol"]


def test_a_card_says_network_and_reference(table):
    from rrepa_lab.runs.card import score_lines

    lines = {line.split(" | ")[0].strip("| "): line for line in score_lines(table)}
    for text in ("network bundled evaluator of digits", "reference test split of digits", "reference sha256 ", "bytes none"):
        assert text in lines["FD[digits]"]
    assert "network" not in lines["nats_per_dim"]


def test_parts_are_chosen_by_name(run):
    assert rl.evaluate(run, limit=20, parts=["bayes"])["metric"].tolist() == ["bayes_accuracy"]
    with pytest.raises(LabError, match="unknown part of an evaluation 'bayess'; did you mean 'bayes'"):
        rl.evaluate(run, parts="bayess")
    with pytest.raises(LabError, match="nothing to measure: samples with 0 samples"):
        rl.evaluate(run, samples=0, parts="samples")
    with pytest.raises(LabError, match="samples must be at least 2"):
        rl.evaluate(run, samples=1)


def test_of_many_classes_the_best_five_are_scored_too():
    many = small_run("none", dtype=torch.float32)
    x, y = many.data("test", 40)
    ranks = label_ranks(many, x, y, "bayes")
    found = rl.classify(many, x, "bayes")
    order = found.scores.argsort(dim=1, descending=True, stable=True)
    assert ranks.tolist() == [int((order[row] == y[row]).nonzero()) for row in range(40)]
    assert (ranks == 0).tolist() == (found.label == y).tolist()
    from rrepa_lab.evaluation import readings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "MANY", 5)  # as if ten classes were many
        table = rl.evaluate(many, samples=0, limit=40, parts=["bayes", "gradient"]).set_index("metric")["value"]
    assert table["bayes_top5_accuracy"] == pytest.approx(float((ranks < 5).double().mean()))
    assert table["bayes_accuracy"] <= table["bayes_top5_accuracy"]
    assert "gradient_top5_accuracy" in table


# --- files ------------------------------------------------------------------------------------------------------------


def test_samples_that_are_saved_are_those_that_were_scored(run, tmp_path):
    path = tmp_path / "samples.npz"
    direct = rl.evaluate_samples(run, 90, save_samples=path).set_index("metric")["value"]
    file = AdmFile(path)
    made = rl.sample(run, range(90), [k % 10 for k in range(90)])
    expected = to_bytes(made.images, "rounded").permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    assert np.array_equal(np.asarray(file.pictures), expected.numpy())
    assert file.labels.tolist() == made.labels.tolist()
    again = rl.score(path, run.data("test").x, "digits").set_index("metric")["value"]
    assert again["FD[digits]"] == pytest.approx(direct["FD[digits]"], rel=0.02), "up to the rounding to bytes"
    assert not list(tmp_path.glob(".*"))


def test_a_reference_that_is_saved_gives_the_same_distance(run, tmp_path):
    path = tmp_path / "reference.npz"
    rl.save_reference(path, "test", "digits", run=run)
    table = rl.evaluate_samples(run, 90).set_index("metric")["value"]
    with pytest.warns(LabWarning, match="left out: the reference holds statistics and no pictures"):
        again = rl.evaluate_samples(run, 90, reference=path).set_index("metric")
    assert again["value"]["FD[digits]"] == pytest.approx(table["FD[digits]"], rel=1e-10)
    assert again["reference"]["FD[digits]"] == "reference.npz"
    assert again["n_reference"]["FD[digits]"] == 360
    with pytest.raises(LabError, match="holds statistics of digits .* and the samples are read by vit"):
        _by_other(run, path)


def _by_other(run, path):
    from rrepa_lab.align.teacher import EncoderConfig
    from rrepa_lab.evaluation.networks.encoder import EncoderNetwork
    from rrepa_lab.evaluation.protocols import PROTOCOLS, Chosen
    from rrepa_lab.evaluation.scores import score_pictures

    config = EncoderConfig(model="vit_tiny_patch16_224", weights="random:0", image_size=16, args={"patch_size": 8, "depth": 2})
    other = Chosen(PROTOCOLS["encoder"], EncoderNetwork("vit", config, False))
    return score_pictures(TensorPictures(run.data("test", 20).x), [(other, find_reference(path))])


def test_a_folder_is_scored_from_the_command_line(run, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(run.data("train", 80).x):
        Image.fromarray(to_bytes(picture, "rounded")[0].numpy()).save(folder / f"{number:03}.png")
    words = ["evaluate", "digits-none", "--samples", str(folder), "--protocol", "digits"]
    assert main([*words, "--json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["FD[digits]"]["n"] == 80
    assert "folder pictures" in rows["FD[digits]"]["protocol"]
    assert main(words) == 0
    assert "reference test split of digits" in capsys.readouterr().out


def test_a_number_of_samples_is_not_a_file(capsys):
    assert main(["evaluate", "digits-none", "--samples", "-5"]) == 2
    assert "samples must be >= 0, not -5" in capsys.readouterr().err
    assert main(["evaluate", "digits-none", "--samples", "5x"]) == 2
    assert "5x is neither a folder of pictures nor a .npz file of them" in capsys.readouterr().err


# --- references -------------------------------------------------------------------------------------------------------


def test_references_are_kept_by_pictures_and_network(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path))
    network, reads = BundledEvaluator(run.config.data), []
    reference = split_reference(run, "test")
    call = type(network).__call__

    def counted(self, pictures):
        reads.append(len(pictures))
        return call(self, pictures)

    monkeypatch.setattr(type(network), "__call__", counted)
    first = reference.statistics(network)
    assert sum(reads) == 360
    again = split_reference(run, "test").statistics(network)
    assert sum(reads) == 360, "from the cache"
    assert np.array_equal(first.pooled.covariance, again.pooled.covariance)
    assert np.array_equal(first.spatial.mean, again.spatial.mean)
    monkeypatch.setattr(network, "sha256", "other weights")
    split_reference(run, "test").statistics(network)
    assert sum(reads) == 720
    split_reference(run, "train").statistics(network)
    assert sum(reads) == 720 + len(run.images("train"))


def test_of_a_large_reference_all_pictures_count_and_some_features_are_kept(run, monkeypatch, tmp_path):
    from rrepa_lab.evaluation import reference as module

    monkeypatch.setenv("RREPA_CACHE", str(tmp_path))
    network = BundledEvaluator(run.config.data)
    whole = split_reference(run, "test").statistics(network)
    monkeypatch.setattr(module, "KEPT", 100)
    some = split_reference(run, "test").statistics(network)
    assert np.allclose(some.pooled.covariance, whole.pooled.covariance, rtol=1e-6, atol=1e-12)
    assert np.allclose(some.spatial.covariance, whole.spatial.covariance, rtol=1e-5, atol=1e-9)
    assert some.n == whole.n == 360
    assert len(some.features) == len(some.labels) == 100
    assert some.labels.bincount().tolist() == [10] * 10, "class-balanced"


def test_mirror_images_are_the_expectation_of_flips(run):
    network = BundledEvaluator(run.config.data)
    pictures = split_reference(run, "test", mirrored=True).pictures
    assert len(pictures) == 720
    assert torch.equal(pictures.batch(torch.tensor([360 + 7]))[0], pictures.batch(torch.tensor([7]))[0].flip(2))
    (both,), (plain,) = (collect(one, [network]) for one in (pictures, split_reference(run, "test").pictures))
    mirrored = collect(TensorPictures(run.data("test").x.flip(3)), [network])[0]
    assert np.allclose(both.pooled.mean, (plain.pooled.mean + mirrored.pooled.mean) / 2, atol=1e-9)


def test_labels_follow_the_rule_of_the_protocol(run):
    turn, random = RunSamples(run, rl.Sampling(200)), RunSamples(run, rl.Sampling(200), "random")
    assert turn.labels.bincount().tolist() == [20] * 10
    assert random.labels.bincount().tolist() != [20] * 10
    assert torch.equal(random.labels, RunSamples(run, rl.Sampling(200), "random").labels)
    assert not torch.equal(random.labels, RunSamples(run, rl.Sampling(200, seed=1), "random").labels)
    assert "labels at random" in random.words


# --- labels and diversity ---------------------------------------------------------------------------------------------


def test_class_diversity_is_a_ratio_of_spreads(run):
    labels = torch.tensor([0, 0, 1, 1, 2])  # one picture has no spread
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [9.0, 9.0]])
    assert mean_spread(features, labels) == pytest.approx(2.0)
    same = rl.evaluate_samples(run, 80).set_index("metric")["value"]["class_diversity"]
    guided = rl.evaluate_samples(run, 80, guidance=4.0).set_index("metric")["value"]["class_diversity"]
    assert guided < same, "guidance narrows a class"


def test_samples_class_by_class_add_up(run):
    whole = rl.evaluate_samples(run, 200).set_index("metric")["value"]
    table = check(rl.samples_by_class(run, 200))
    agree = table[table["metric"] == "label_agreement"]
    assert agree["class"].tolist() == run.classes
    assert agree["n"].tolist() == [20] * 10
    assert agree["value"].mean() == pytest.approx(whole["label_agreement"])
    assert (agree.loc[agree["value"] == 1, "predicted"] == "").all()
    assert (agree.loc[agree["value"] < 1, "predicted"] != agree.loc[agree["value"] < 1, "class"]).all()
    with pytest.raises(LabError, match="protocol tarflow has no classifier|need the weights of Inception"):
        rl.samples_by_class(run, 200, protocol="tarflow")


def test_labels_of_a_file_are_those_of_the_run(run, tmp_path):
    made, path = rl.sample(run, range(80), [k % 10 for k in range(80)]), tmp_path / "samples.npz"
    with picture_writer(path, 80, (1, 8, 8), made.labels) as write:
        write(to_bytes(made.images, "rounded"))
    direct = rl.evaluate_samples(run, 80).set_index("metric")["value"]
    found = check(rl.score(path, "test", "digits", run=run)).set_index("metric")["value"]
    assert found["label_agreement"] == pytest.approx(direct["label_agreement"], abs=0.02)
    with picture_writer(path, 80, (1, 8, 8), made.labels + 3) as write:
        write(to_bytes(made.images, "rounded"))
    with pytest.raises(LabError, match=r"24 of 80 samples have a label outside of 0..9: 10"):
        rl.score(path, "test", "digits", run=run)


# --- nearest training images ------------------------------------------------------------------------------------------


def test_copies_of_training_images_are_found(run):
    train = run.images("train").__getitems__([5, 700, 1100]).x
    found = rl.nearest_training(run, train)
    assert found.row.tolist() == [5, 700, 1100]
    assert found.distance.tolist() == [0, 0, 0]
    assert torch.equal(found.training, train)
    values = found.table.set_index("metric")["value"]
    assert values["closer_than_held_out"] == 1
    assert values["held_out_train_distance"] > 0
    check(found.table)


def test_nearest_images_are_those_of_brute_force(run):
    x, train = run.data("test", 20).x, run.images("train").__getitems__(range(len(run.images("train")))).x
    distances = (x[:, None] - train[None]).square().mean(dim=(2, 3, 4)).sqrt()
    found = rl.nearest_training(run, x)
    assert found.row.tolist() == distances.argmin(dim=1).tolist()
    assert torch.allclose(found.distance, distances.amin(dim=1), atol=1e-6)
    whole = rl.nearest_training(run, run.data("test").x)
    assert whole.table["value"][0] == pytest.approx(whole.table["value"][1]), "held-out images as samples are as far"
    assert whole.table["value"][2] == pytest.approx(0.01, abs=0.01)
    with pytest.raises(LabError, match="training images are their own nearest ones"):
        rl.nearest_training(run, x, split="train")
    with pytest.raises(LabError, match=r"the pictures are \(3, 9, 9\)"):
        rl.nearest_training(run, torch.zeros(2, 3, 9, 9))


def test_nearest_images_are_drawn_from_the_command_line(tmp_path):
    from PIL import Image

    path = tmp_path / "nearest.png"
    assert main(["evaluate", "digits-none", "--samples", "20", "--parts", "nearest", "--nearest", str(path), "--json"]) == 0
    with Image.open(path) as picture:
        assert picture.size[0] > 16 * 8


# --- settings chosen on validation ------------------------------------------------------------------------------------


def test_guidance_is_chosen_on_validation_and_reported_on_test():
    run = rl.load("digits-none")
    with pytest.raises(LabError, match="has no validation split, and test images must not decide"):
        rl.choose_sampling(_without_validation())
    table = check(rl.choose_sampling(run, guidances=[0.0, 1.0, 4.0], samples=80))
    distance = table[table["metric"] == "FD[digits]"].reset_index(drop=True)
    val, test = distance[distance["split"] == "val"], distance[distance["split"] == "test"]
    assert val["guidance"].tolist() == [0.0, 1.0, 4.0]
    assert int(val["chosen"].sum()) == 1
    assert val.loc[val["value"].idxmin(), "chosen"]
    assert test["guidance"].tolist()[0] == 0.0
    assert test["chosen"].any()
    assert set(test["seed"]) == {1_000_000}, "fresh samples: a gain is not that of the choice"
    agreement = rl.choose_sampling(run, guidances=[0.0, 2.0], samples=80, by="label_agreement")
    rows = agreement[(agreement["metric"] == "label_agreement") & (agreement["split"] == "val")]
    assert rows.loc[rows["value"].idxmax(), "chosen"]
    with pytest.raises(LabError, match="unknown metric of samples 'FDD'"):
        rl.choose_sampling(run, guidances=[0.0], samples=80, by="FDD")
    with pytest.raises(LabError, match="neither a higher nor a lower value is better"):
        rl.choose_sampling(run, guidances=[0.0], samples=80, by="class_diversity")


def _without_validation():
    run = rl.load("digits-none")
    run.config, run.fingerprints = run.config.override({"data.holdout": 0.0}), {}
    return run


def test_sweep_from_the_command_line(capsys):
    assert main(["sweep", "digits-none", "--guidance", "0,1", "--samples", "80"]) == 0
    text = capsys.readouterr().out
    assert text.count("FD[digits]") >= 3
    assert "rrepa-lab evaluate digits-none --guidance" in text
    assert main(["sweep", "digits-none", "--guidance", "0,x"]) == 2
    assert "--guidance takes numbers" in capsys.readouterr().err


# --- published numbers, and protocols that do not mix -----------------------------------------------------------------


def test_published_tables_hold_the_numbers_of_the_paper():
    one = {(row.settings["align.strategy"], row.settings.get("align.blocks"), row.settings.get("align.layers"), row.metric):
           row.value for row in paper_findings("paper-table-1")}  # fmt: skip
    assert one["none", None, None, "FID[paper]"] == 12.91
    assert one["reverse", "7,8", "6", "FID[paper]"] == 11.71
    assert one["reverse", "7,8", "6", "accuracy[paper]"] == pytest.approx(0.5735)
    assert set(ALIASES.values()) <= set(paper_tables())
    for name in paper_tables():
        for row in paper_findings(name):
            assert row.metric.endswith("[paper]")
            assert math.isfinite(row.value)
            assert "network unknown" in row.protocol, "the paper names no evaluator"
    with pytest.raises(LabError, match="unknown published table 'paper-table-2'"):
        paper_findings("paper-table-2")


def test_published_numbers_stand_beside_measured_ones_in_columns_of_their_own(run):
    table = rl.compare([run], samples=0, limit=20, beside="paper-table-1")
    assert {"nats_per_dim", "FID[paper]", "accuracy[paper]"} <= set(table["metric"])
    ours = table[table["metric"] == "nats_per_dim"]
    assert len(ours) == 1
    assert len(table[table["metric"] == "FID[paper]"]) == 10


def test_a_mixture_of_protocols_is_refused_and_the_fields_are_named(run):
    def findings(sampling, source):
        rows = measurements(rl.evaluate_samples(run, sampling))
        return [Finding(source, row.settings, 0, row.metric, row.value or 0.0, row.unit, row.n, row.protocol) for row in rows]

    plain, guided = findings(rl.Sampling(80), "a"), findings(rl.Sampling(80, guidance=1.0), "b")
    with pytest.raises(LabError, match=r"FD\[digits\] was measured under 2 protocols.*They differ in guidance: 0.0 and 1.0\."):
        tabulate([*plain, *guided])
    more = findings(rl.Sampling(90), "c")
    with pytest.raises(LabError, match="They differ in n: 80 and 90"):
        tabulate([*plain, *more])
    apart = tabulate([*plain, *guided], apart=True)
    assert {"FD[digits] [1]", "FD[digits] [2]"} <= set(apart["metric"])


def test_intervals_over_samples_are_no_part_of_a_protocol_nor_of_the_spread_over_seeds(run, table):
    for row in measurements(table):
        assert "bootstrap" not in row.protocol
    compared = rl.compare([run], samples=0, limit=20)
    assert not {"low", "high"} & set(compared.columns)
    assert pd.isna(compared["sd"]).all(), "of one seed there is no spread"


def test_names_of_version_0_1_are_read():
    from rrepa_lab.measurements.claims import Claim
    from rrepa_lab.measurements.results import Measurement

    assert Measurement(metric="frechet_distance", value=1.0).metric == "FD[digits]"
    claim = Claim(claim="c", metric="frechet_distance", contrasts=[{"better": {"a": 1}, "than": {"a": 2}}])
    assert claim.metric == "FD[digits]"


def test_floats_of_a_split_are_its_bytes():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_floats(levels.view(256, 1, 1, 1)), "rounded").flatten(), levels)


def test_runs_whose_best_layers_differ_share_a_column(run, tmp_path):
    """The layer is what was found, not how: two runs stand in one table of `rl.compare`."""
    tables = []
    for name, tap in (("one", "block.1.layer.2"), ("two", "block.4.layer.3")):
        row = rl.evaluate(run, samples=0, limit=20, parts="probe").assign(run=name, best_tap=tap)
        config = run.config.model_copy(update={"name": name})
        alone = rl.Run(run.flow, config, run.classes, run.projectors)
        rl.write_result(tmp_path / name, "mine", row, [alone])
        tables.append(tmp_path / name / "result.json")
    compared = rl.compare(tables)
    assert compared["metric"].tolist() == ["linear_accuracy"] * 2
    assert compared["protocol"].nunique() == 1
