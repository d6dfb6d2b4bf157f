"""Flows whose blocks have several depths: one number of layers for each block."""

import json

import pytest
import torch
from conftest import PLAIN, make_flow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.strategy import strategy_names
from rrepa_lab.errors import LabError
from rrepa_lab.flow.decode.plan import METHODS
from rrepa_lab.flow.taps import Tap
from rrepa_lab.runs.config import complete
from rrepa_lab.runs.describe import describe_config, summary
from rrepa_lab.viz.layers import layer_curves, layer_map

DEEP = rl.FlowConfig(classes=10, width=16, head_width=8, blocks=3, layers=[3, 1, 2])
SETTINGS = PLAIN | {
    "flow.width": 16, "flow.head_width": 16, "flow.blocks": 3, "flow.layers": [3, 1, 2], "align.blocks": [1, 3],
    "align.layers": [-1], "align.projector_width": 8, "train.steps": 3, "train.batch": 16, "train.log_every": 1,
}  # fmt: skip


@pytest.fixture
def flow() -> rl.TarFlow:
    return make_flow(DEEP)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_each_block_has_its_own_depth(flow):
    assert DEEP.depths == (3, 1, 2)
    assert [len(flow.block(number).transformer.layers) for number in (1, 2, 3)] == [3, 1, 2]
    assert [tap.name for tap in flow.resolve("block.*.layer.2")] == ["block.1.layer.2", "block.3.layer.2"]
    with pytest.raises(LabError, match=r"block.2.layer.2.*3 blocks of 3, 1 and 2 layers"):
        flow.resolve("block.2.layer.2")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "auto"])
def test_decoding_inverts_it(flow, x, method):
    y = torch.tensor([1, -1, 9])
    out = flow(x, y, taps="block.*.layer.*")
    assert_close(flow.inverse(out.z, y, method=method).x, x, atol=1e-8, rtol=0)
    back = flow.inverse(out.z, y, method="sequential", taps="block.*.layer.*")
    for tap, state in out.states.items():
        assert_close(back.states[tap], state, atol=1e-8, rtol=0)


@pytest.mark.parametrize("strategy", [name for name in strategy_names() if name != "none"])
def test_a_number_from_the_end_is_counted_in_its_own_block(strategy, tmp_path):
    config = rl.preset("digits-reverse").override(SETTINGS | {"align.strategy": strategy})
    list(rl.train(config, tmp_path / "run", device="cpu"))
    run = rl.load(tmp_path / "run")
    assert run.config.align.taps == ["block.1.layer.3", "block.3.layer.2"] == run.projectors.taps
    batch = run.data("test", 4)
    one = rl.alignment(run, *batch, strategy=strategy)
    assert set(one.similarity) == set(run.config.align.taps)
    if strategy == "reverse":
        table = rl.probe(run, probes=["knn"], baselines=False, limit=60)
        assert list(zip(table["block"], table["layer"], strict=True)) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (3, 2)]
        cells = layer_map(table, "knn_accuracy").data[0].z
        assert [sum(value == value for value in row) for row in cells] == [3, 1, 2]  # noqa: PLR0124 (nan where there is none)
        assert len(layer_curves(table, "knn_accuracy").data[0].x) == 6


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([2], ["block.1.layer.2", "block.3.layer.2"]),
        ([-1, 1], ["block.1.layer.3", "block.1.layer.1", "block.3.layer.2", "block.3.layer.1"]),
        ([[1, 3], [-1]], ["block.1.layer.1", "block.1.layer.3", "block.3.layer.2"]),
        ([-9], ["block.1.layer.1", "block.3.layer.1"]),
    ],
)
def test_aligned_layers(layers, expected):
    config = rl.preset("digits-reverse").override(SETTINGS | {"align.layers": layers})
    found = complete(config)
    assert found.align.taps == expected
    assert complete(found) == found == rl.RunConfig.from_dict(json.loads(json.dumps(found.to_dict())))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow.layers": [2, 2]}, "flow: layers has 2 entries, but there are 3 blocks"),
        ({"flow.layers": [2, 0, 2]}, "flow.layers: must be 1 to 1024, or a list of such numbers"),
        ({"flow.layers": []}, "layers has 0 entries"),
        ({"flow.layers": "deep"}, "flow.layers: must be 1 to 1024"),
        ({"flow.blocks": 5, "flow.layers": [1000] * 5}, "are 5000 layers, more than 4096"),
        ({"align.layers": [3]}, r"align.layers \[3\]: layer 3 is not in 1..2, the layers of block 3"),
        ({"align.layers": [0]}, "layer 0 is not in 1..3, the layers of block 1"),
        ({"align.blocks": [-2], "align.layers": [2]}, "layer 2 is not in 1..1, the layers of block 2"),
        ({"align.layers": [[1]]}, r"align.layers has 1 lists, but align.blocks \[1, 3\]"),
        ({"align.layers": [[1], []]}, "align.layers: must be a list of layer numbers, or such a list for each"),
        ({"align.layers": [[1], 2]}, "align.layers: must be a list of layer numbers, or such a list for each"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, message):
    with pytest.raises(LabError, match=message) as caught:
        rl.preset("digits-reverse").override(SETTINGS | settings)
    assert "\n" not in str(caught.value)


def test_it_is_described():
    config = complete(rl.preset("digits-reverse").override(SETTINGS))
    assert "3 blocks x 3,1,2 layers" in summary(config)
    assert "block 1 at layer 3, block 3 at layer 2" in summary(config)
    facts = describe_config(config)
    assert facts["flow"] == "3 blocks x 3,1,2 layers, width 16"
    assert facts["aligned"][1] == "block.3.layer.2 (blocks.2.transformer.layers.1)"


def test_a_number_stays_a_number():
    config = rl.preset("digits-reverse")
    assert config.to_dict()["flow"]["layers"] == 4
    assert complete(config).to_dict()["align"] == config.to_dict()["align"]
    assert AlignConfig(strategy="reverse", blocks=[-2, -1], layers=[-1]).counted(4, 4).layers == [4]


def test_pickers_of_the_page_stay_within_a_block(tmp_path):
    from tabs.training.tab import tap_choices
    from tabs.trajectories import tap_in

    config = rl.preset("digits-reverse").override(SETTINGS | {"align.strategy": "none", "train.steps": 1})
    list(rl.train(config, tmp_path / "run", device="cpu"))
    run = rl.load(tmp_path / "run")
    assert len(tap_choices(run)) == 6
    assert [tap_in(run, *place) for place in ((1, 9), (2, 3), (9, 2))] == [Tap(1, 3), Tap(2, 1), Tap(3, 2)]
