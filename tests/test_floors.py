"""Floors of the cosine with a teacher, the gradient ratio, and where both stand beside the similarity."""

from copy import deepcopy

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import rrepa_lab as rl
from rrepa_lab.align.floors import TargetMeans, position_floor
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis.floors import teacher_floors
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.data.splits import load_split
from rrepa_lab.errors import LabError
from rrepa_lab.measurements.results import measurements
from rrepa_lab.runs.card import save_scores, score_lines, write_card
from rrepa_lab.runs.run import build
from rrepa_lab.studies.reading import over_seeds
from rrepa_lab.training.objective import Objective
from rrepa_lab.viz.layers import layer_curves, layer_map
from rrepa_lab.viz.training import similarity_curves

TAP = "block.3.layer.2"


@pytest.fixture(scope="module")
def reverse():
    return rl.load("digits-reverse")


def values(table, tap=TAP):
    return table[table["tap"] == tap].set_index("metric")["value"]


def targets(n=12, patches=3, dim=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, patches, dim, generator=draw)
    return shared + torch.randn(n, patches, dim, generator=draw) * torch.rand(n, 1, 1, generator=draw)


# --- the constants ----------------------------------------------------------------------------------------------------


def by_hand(features, labels, own):
    """Each image against the mean direction of the others: of all, and of those of its class."""
    unit, found = F.normalize(features, dim=-1), (list[float](), list[float]())
    for i, label in enumerate(labels):
        others = [j for j in range(len(unit)) if not (own and i == j)]
        alike = [j for j in others if labels[j] == label] or others
        for place, rows in zip(found, (others, alike), strict=True):
            place.append(float((unit[i] * F.normalize(unit[rows].mean(dim=0), dim=-1)).sum(dim=-1).mean()))
    return [sum(place) / len(place) for place in found]


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_floors_of_a_table_leave_each_image_out(chunk):
    features, labels = targets(), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 4, 4, 4, 4])  # one image of class 2, none of class 3
    found = position_floor(features * torch.rand(12, 3, 1), labels, chunk)  # lengths do not matter
    position, label_position = by_hand(features, labels.tolist(), own=True)
    assert found == {"position": pytest.approx(position, abs=1e-5), "label_position": pytest.approx(label_position, abs=1e-5)}


def test_one_image_for_each_class_has_no_floor_of_one():
    found = position_floor(targets(), torch.arange(12))
    assert found["label_position"] == pytest.approx(found["position"])
    assert found["label_position"] < 0.95


@pytest.mark.parametrize("labels", [None, torch.full((12,), -1)])
def test_without_labels_the_position_is_the_only_floor(labels):
    assert set(position_floor(targets(), labels)) == {"position"}


def test_no_other_constant_comes_nearer():
    features = targets(40)
    means = TargetMeans(1)
    means.add(features, torch.zeros(40))
    best = float(means.floor(features, torch.zeros(40)).position.mean())
    guess = torch.zeros(3, 5).requires_grad_()
    optimizer = torch.optim.Adam([guess], 0.05)
    for _ in range(400):
        loss = -F.cosine_similarity(guess + 1e-3, features, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -loss.item() == pytest.approx(best, abs=1e-4)
    assert best < 1


@pytest.mark.parametrize(("n", "labels"), [(1, None), (4, torch.zeros(3))])
def test_tables_without_a_floor_are_refused(n, labels):
    with pytest.raises(LabError, match="at least two images"):
        position_floor(targets(n), labels)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_floors_of_the_bundled_digits(reverse):
    table = teacher_floors(reverse)
    found = values(table)
    assert found["floor_position"] == pytest.approx(0.784, abs=0.003)
    assert found["floor_label_position"] == pytest.approx(0.901, abs=0.003)
    assert found["cosine_without_label"] == pytest.approx(0.939, abs=0.004)
    assert found["cosine"] == pytest.approx(0.970, abs=0.004)
    assert found["above_floor"] == pytest.approx(found["cosine"] - found["floor_label_position"])
    assert found["above_floor_without_label"] == pytest.approx(found["cosine_without_label"] - found["floor_position"])
    assert set(table["tap"]) == set(reverse.projectors.taps)
    assert set(table["unit"]) == {"cosine"}
    assert (table["n"] == 360).all()
    assert (table["n_train"] == 1149).all()
    assert set(table["noise_std"]) == {0.2}, "what the flow reads in training"


def test_floors_against_their_definition(reverse):
    train, test = (reverse.data(split, limit) for split, limit in (("train", 200), ("test", 60)))
    found = values(teacher_floors(reverse, rl.Images(data=test), taps=TAP, train=train, noise_std=0))
    encoder = reverse.encoder()
    fitted, scored = (F.normalize(match_grid(encoder(x), encoder.grid, 4), dim=-1) for x, _ in (train, test))
    position = F.normalize(fitted.mean(dim=0), dim=-1)
    by_class = torch.stack([F.normalize(fitted[train.y == k].mean(dim=0), dim=-1) for k in range(10)])
    assert found["floor_position"] == pytest.approx(float((scored * position).sum(-1).mean()), abs=1e-5)
    assert found["floor_label_position"] == pytest.approx(float((scored * by_class[test.y]).sum(-1).mean()), abs=1e-5)
    for metric, y in (("cosine", test.y), ("cosine_without_label", None)):
        projected = reverse.projectors.project(TAP, reverse.flow(test.x, y, TAP).states[TAP])
        assert found[metric] == pytest.approx(float(F.cosine_similarity(projected, scored, dim=-1).mean()), abs=1e-5)


def test_a_layer_that_reads_nothing_is_not_above_its_floor():
    run = rl.load("digits-reverse")
    encoder, (x, _) = run.encoder(), run.data("train")
    with torch.no_grad():
        for parameter in run.projectors.parameters():
            parameter.zero_()
        *_, last = run.projectors["block_3_layer_2"].children()
        assert isinstance(last, torch.nn.Linear)
        last.bias.copy_(F.normalize(encoder(x), dim=-1).mean(dim=(0, 1)))
    found = values(teacher_floors(run, rl.Images(limit=300), taps=TAP))
    assert found["cosine"] > 0.3, "a constant looks like a similarity"
    assert found["above_floor_without_label"] < 0
    assert found["above_floor"] < 0


def test_the_training_split_is_compared_with_other_images(reverse):
    own = values(teacher_floors(reverse, rl.Images("train", limit=80), taps=TAP))
    x, y = reverse.data("train", 80)
    encoder = reverse.encoder()
    expected = position_floor(match_grid(encoder(x), encoder.grid, 4), y)
    assert own["floor_position"] == pytest.approx(expected["position"], abs=1e-5)
    assert own["floor_label_position"] == pytest.approx(expected["label_position"], abs=1e-5)


def test_a_flow_without_classes_has_the_position_alone():
    config = rl.preset("digits-reverse").override({"flow.classes": 0, "align.projector_width": 16})
    found = values(teacher_floors(build(config, []), rl.Images(limit=60)))
    assert set(found.index) == {"floor_position", "cosine", "above_floor"}
    assert found["above_floor"] == pytest.approx(found["cosine"] - found["floor_position"])


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("digits-none", {}, "no projector for any layer .it has: none"),
        ("digits-reverse", {"taps": "block.1.layer.1"}, "no projector for block.1.layer.1 .it has: block.3.layer.2"),
        ("digits-reverse", {"images": rl.Images("valid")}, "unknown split"),
    ],
)
def test_floors_that_cannot_be_measured(name, settings, match):
    with pytest.raises(LabError, match=match):
        teacher_floors(rl.load(name), **settings)


# --- beside the similarity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fed", "floor", "of"), [(False, "floor_position", "position"),
                                                  (True, "floor_label_position", "label and position")])  # fmt: skip
def test_a_cosine_with_the_teacher_has_its_floor_beside_it(reverse, fed, floor, of):
    how, some = rl.FeatureProtocol(feed_label=fed), rl.Images(limit=150)
    table = rl.similarity(reverse, taps=TAP, metrics=["cka", "teacher_cosine"], protocol=how, images=some)
    row = table[table["metric"] == "teacher_cosine"].iloc[0]
    expected = values(teacher_floors(reverse, some, taps=TAP, noise_std=0))
    assert row["floor"] == pytest.approx(expected[floor], abs=1e-5)
    assert row["value"] == pytest.approx(expected["cosine" if fed else "cosine_without_label"], abs=1e-5)
    assert row["above_floor"] == pytest.approx(row["value"] - row["floor"])
    assert row["floor_of"] == of
    other = table[table["metric"] == "cka"].iloc[0]
    assert pd.isna(other["floor"])
    assert other["floor_of"] == ""


def test_generated_images_have_a_floor_too(reverse):
    how = rl.FeatureProtocol("reverse", feed_label=True, samples=40)
    table = rl.similarity(reverse, taps=TAP, metrics=["teacher_cosine"], protocol=how)
    assert 0.85 < table["floor"][0] < 0.95
    assert 0 < table["above_floor"][0] < 0.1


def test_a_floor_needs_the_training_split_and_the_cosine_does_not(reverse):
    far = rl.load("digits-reverse")
    far.config = far.config.override({"data.name": "folder", "data.path": "nowhere"})
    some = rl.Images(data=reverse.data("test", 40))
    row = rl.similarity(far, taps=TAP, metrics=["teacher_cosine"], images=some).iloc[0]
    assert 0.9 < row["value"] < 1
    assert pd.isna(row["floor"])
    assert pd.isna(row["above_floor"])


def test_floors_pass_through_results_and_means_over_seeds(reverse):
    table = rl.similarity(reverse, taps=TAP, metrics=["teacher_cosine"], images=rl.Images(limit=60))
    (row,) = measurements(table)
    assert f"{table['floor'][0]}" not in row.protocol, "a measured number is no protocol: seeds would not stand in one column"
    assert "floor_of position" in row.protocol
    other = table.assign(train_seed=1, value=table["value"] + 0.02, above_floor=table["above_floor"] + 0.02)
    (mean,) = over_seeds(pd.concat([table, other], ignore_index=True)).to_dict("records")
    assert mean["train_seeds"] == 2
    assert mean["value"] == pytest.approx(table["value"][0] + 0.01)
    assert mean["above_floor"] == pytest.approx(table["above_floor"][0] + 0.01)
    assert mean["floor"] == pytest.approx(table["floor"][0])


def test_figures_show_the_floor(reverse):
    table = rl.similarity(reverse, taps=TAP, metrics=["cka", "teacher_cosine"], images=rl.Images(limit=60))
    floor = table["floor"].dropna().iloc[0]
    for figure in (layer_map(table, "teacher_cosine"), layer_curves(table, "teacher_cosine")):
        caption = " ".join(note.text for note in figure.layout.annotations).replace("<br>", " ")
        assert f"position alone reaches {floor:.3f}" in caption
    levels = [trace for trace in layer_curves(table, "teacher_cosine").data if trace.name == "floor: position"]
    assert [list(trace.y) for trace in levels] == [[pytest.approx(floor)] * 3]
    assert not [trace for trace in layer_curves(table, "cka").data if "floor" in str(trace.name)]


def reports(**floors):
    rows = [{"step": step, "seconds": 1.0, "nats_per_dim": 0.5, "similarity": {TAP: 0.5 + step / 100}} for step in (10, 20)]
    return pd.json_normalize([row | ({"floors": floors} if floors else {}) for row in rows])


def test_records_with_floors_say_so_on_the_card_and_in_the_figure(tmp_path):
    run = build(rl.preset("digits-none"), [str(k) for k in range(10)])
    run.directory = tmp_path
    write_card(run, reports(position=0.6, label_position=0.65))
    card = (tmp_path / "card.md").read_text()
    assert f"at {TAP}: 0.700, +0.050 above label and position alone, +0.100 above position alone." in card
    assert "label and position 0.650, position 0.600" in card
    write_card(run, reports())
    card = (tmp_path / "card.md").read_text()
    assert f"at {TAP}: 0.700." in card
    assert "loor" not in card.split("\n", 1)[1], "records of version 0.1 have none"
    figure = similarity_curves({"one": reports(position=0.6), "two": reports(position=0.6)}, "caption")
    assert [trace.name for trace in figure.data] == [f"one, {TAP}", f"two, {TAP}", "position alone 0.600"]
    assert len(similarity_curves({"one": reports()}).data) == 1


def test_splits_stand_side_by_side_on_the_card(tmp_path):
    def scores(split, value, n):
        return pd.DataFrame([{"split": split, "metric": "m", "value": value, "unit": "u", "n": n, "protocol": "p"}])

    alone = score_lines(scores("test", 0.2, 360))
    assert alone[-1] == "| m | 0.2000 | u | 360 | p |"
    only = scores("test", 9.0, 50).assign(metric="k", protocol="q")
    lines = score_lines(pd.concat([scores("train", 0.1, 1437), scores("test", 0.2, 360), only], ignore_index=True))
    assert lines[0] == "| metric | train | test | unit | n | protocol |"
    assert lines[2:] == ["| m | 0.1000 | 0.2000 | u | 1437 / 360 | p |", "| k | - | 9.0000 | u | - / 50 | q |"]
    run = build(rl.preset("digits-none"), [str(k) for k in range(10)])
    run.directory = tmp_path
    save_scores(run, pd.concat([scores("train", 0.1, 1437), scores("test", 0.2, 360)], ignore_index=True))
    assert lines[2] in (tmp_path / "card.md").read_text()
    # which images of a split were scored is no difference of protocol; the noise that they were read under is one
    part = ", 50 of 450, class-balanced, seed 0, train = 90% of train/, stratified"
    half, whole = scores("train", 0.1, 50).assign(protocol=f"p{part}"), scores("test", 0.2, 360)
    lines = score_lines(pd.concat([half, whole], ignore_index=True))
    assert lines[2:] == [f"| m | 0.1000 | 0.2000 | u | 50 / 360 | p; train: {part[2:]} |"]
    other = scores("test", 0.2, 360).assign(protocol="q")
    assert len(score_lines(pd.concat([half, other], ignore_index=True))) == 4


# --- the ratio of the gradients ---------------------------------------------------------------------------------------


def by_objective(run, strategy, rows, seed, batch):
    """The two gradients of one batch as differences of what the training objective gives, in float64."""
    images = load_split(run.config.data, "train")
    x, y = images.__getitems__(rows)
    config = run.flow.config
    noised = training_noise(x, config.noise, config.noise_std, images.levels, generator(seed, 2, batch)).double()
    encoder = run.encoder()
    target = match_grid(encoder(x), encoder.grid, config.side).double()
    flow, projectors = deepcopy(run.flow).double().requires_grad_(), deepcopy(run.projectors).double()
    names = [name for name, _ in flow.named_parameters()]
    found = list[tuple[torch.Tensor, ...]]()
    for used in ("none", strategy):
        align = run.config.align.override({"strategy": used})
        total = Objective(flow, projectors, align)(noised, y, target if used != "none" else None).total
        found.append(torch.autograd.grad(total, list(flow.parameters()), allow_unused=True, materialize_grads=True))
    alone, both = found
    return {name: (a, b - a) for name, a, b in zip(names, alone, both, strict=True)}


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse", "reverse-exact"])
def test_the_gradient_ratio_is_that_of_the_training_objective(reverse, strategy):
    table = rl.gradient_ratio(reverse, strategy=strategy, batches=2, batch=5, seed=3)
    rows = torch.randperm(len(load_split(reverse.config.data, "train")), generator=generator(3, 1)).split(5)
    both = [by_objective(reverse, strategy, rows[batch].tolist(), 3, batch) for batch in range(2)]
    modules = {"all": "", "block.1": "blocks.0.", "block.4": "blocks.3.", "block.3.layer.2": "blocks.2.transformer.layers.1."}
    for group, prefix in modules.items():
        part = table[table["group"] == group].set_index("metric")
        vectors = [
            [torch.cat([pair[k].flatten() for name, pair in one.items() if name.startswith(prefix)]) for k in (0, 1)]
            for one in both
        ]
        likelihood, alignment = ([float(pair[k].norm()) for pair in vectors] for k in (0, 1))
        ratios = [a / b for a, b in zip(alignment, likelihood, strict=True)]
        assert part.loc["likelihood_gradient", "value"] == pytest.approx(sum(likelihood) / 2, rel=1e-6)
        assert part.loc["alignment_gradient", "value"] == pytest.approx(sum(alignment) / 2, rel=1e-6, abs=1e-9)
        assert part.loc["gradient_ratio", "value"] == pytest.approx(sum(ratios) / 2, rel=1e-6, abs=1e-9)
        assert part.loc["gradient_ratio", "standard_error"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2, rel=1e-5, abs=1e-9)
        if ratios[0]:
            cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in vectors]
            assert part.loc["gradient_cosine", "value"] == pytest.approx(sum(cosines) / 2, abs=1e-6)
        else:
            assert pd.isna(part.loc["gradient_cosine", "value"])
        assert part.loc["gradient_ratio", "parameters"] == vectors[0][0].numel()
    assert (table["n"] == 10).all()


def test_lambda_scales_the_ratio_and_the_run_stays_as_it_was(reverse):
    before = {name: value.clone() for name, value in reverse.flow.state_dict().items()}
    once = rl.gradient_ratio(reverse, batches=1, batch=4)
    twice = rl.gradient_ratio(reverse, batches=1, batch=4, weight=2 * reverse.config.align.weight)
    ratio = [table[table["metric"] == "gradient_ratio"]["value"].to_numpy() for table in (once, twice)]
    assert ratio[1] == pytest.approx(2 * ratio[0])
    assert 0.001 < ratio[0][0] < 0.2, "saturated at the end of the bundled training"
    assert set(once["weight"]) == {0.5}
    assert all(torch.equal(value, before[name]) for name, value in reverse.flow.state_dict().items())
    assert not any(parameter.requires_grad for parameter in reverse.flow.parameters())
    assert next(reverse.flow.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("digits-none", {}, "aligns nothing"),
        ("digits-none", {"strategy": "reverse"}, "aligns nothing"),
        ("digits-reverse", {"strategy": "none"}, "aligns nothing"),
        ("digits-reverse", {"strategy": "revers"}, "unknown strategy 'revers'"),
        ("digits-reverse", {"batches": 0}, "batches must be at least 1"),
        ("digits-reverse", {"batch": 0}, "at least one image"),
    ],
)
def test_ratios_that_do_not_exist(name, settings, match):
    with pytest.raises(LabError, match=match):
        rl.gradient_ratio(rl.load(name), **settings)
