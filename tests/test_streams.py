"""Random streams: one for each key, and noise that an image keeps whatever stands beside it."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import add_noise, dequantize, training_noise
from rrepa_lab.data.streams import RowStreams


def numbers(*key):
    return tuple(torch.rand(4, generator=generator(*key)).tolist())


def test_every_key_has_a_stream_of_its_own():
    small = [key for length in range(1, 7) for key in product((0, 1, 3), repeat=length)]
    large = [(2**32,), (0, 1), (2**32 + 5, 7), (5, 1, 7), (2**63 - 1,), (2**32 - 1, 2**31 - 1), (3 * 2**32, 0), (0, 3, 0, 0)]
    keys = list(dict.fromkeys([*small, *large]))
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(0, 3) == numbers(0, 3)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 5), (1, 3, 3), (1, 1, 1), (3, 7, 9), (3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_an_image_does_not_depend_on_the_batch(kind, shape, dtype):
    x = torch.rand(9, *shape, generator=generator(1), dtype=dtype) * 2 - 1
    everything = training_noise(x, kind, 0.3, 256, generator(0))
    for count in range(1, 9):
        assert torch.equal(training_noise(x[:count], kind, 0.3, 256, generator(0)), everything[:count])


def test_noise_of_odd_shapes_is_standard_normal():
    eps = add_noise(torch.zeros(4000, 3, 3, 3), 1.0, generator(0)).flatten(1)
    assert_close(eps.mean(0), torch.zeros(27), atol=0.08, rtol=0)
    assert_close(eps.T @ eps / len(eps), torch.eye(27), atol=0.08, rtol=0)


def test_dequantization_stays_within_a_bin():
    x = torch.linspace(-1, 1, 17).view(1, 1, 1, 17)
    u = (dequantize(x, 17, generator(0)) + 1) * 17 / 2 - torch.arange(17)
    assert ((u >= 0) & (u < 1)).all()


KINDS = {
    "scalars": lambda streams: streams.scalars(5),
    "normal": lambda streams: streams.normal((3, 5)),
    "uniform": lambda streams: streams.uniform((2, 9)),
    "noise": lambda streams: training_noise(torch.zeros(len(streams), 1, 4, 4), "gaussian", 0.3, 256, streams),
    "dequantization": lambda streams: training_noise(torch.zeros(len(streams), 1, 4, 4), "uniform", 0, 256, streams),
}


@pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
def test_the_numbers_of_a_row_do_not_depend_on_its_batch(draw):
    rows = torch.randperm(1_300_000, generator=generator(0))[:9].tolist()
    together = draw(RowStreams((3, 1, 7), rows))
    for first, second in (rows[0::2], rows[1::2]), (rows[:1], rows[1:]), (rows[::-1], []):
        apart = dict(
            zip([*first, *second], [*draw(RowStreams((3, 1, 7), first)), *draw(RowStreams((3, 1, 7), second))], strict=True)
        )
        assert torch.equal(torch.stack([apart[row] for row in rows]), together)


@pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
def test_rows_epochs_purposes_and_seeds_have_streams_of_their_own(draw):
    keys = [(seed, purpose, epoch) for seed in (0, 1, 2**63 - 1) for purpose in (2, 3) for epoch in (0, 1)]
    found = [tuple(row.flatten().tolist()) for key in keys for row in draw(RowStreams(key, [0, 1, 2, 2**32]))]
    assert len(set(found)) == len(found)


def test_scalars_are_uniform_and_independent():
    values = RowStreams((0, 2, 0), range(20_000)).scalars(3)
    assert ((values >= 0) & (values < 1)).all()
    counts = torch.histc(values.flatten(), 20, 0, 1)
    assert ((counts - 3000).square() / 3000).sum() < 43.8, "chi-squared with 19 degrees of freedom, p 0.001"
    near = torch.corrcoef(torch.cat([values[:-1], values[1:]], dim=1).T)
    assert (near - torch.eye(6, dtype=near.dtype)).abs().max() < 0.03


def test_noise_of_rows_is_standard_normal():
    eps = RowStreams((0, 3, 0), range(4000)).normal((27,))
    assert_close(eps.mean(0), torch.zeros(27), atol=0.08, rtol=0)
    assert_close(eps.T @ eps / len(eps), torch.eye(27), atol=0.08, rtol=0)
