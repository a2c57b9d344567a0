"""NF4: the published tables, the layout of bitsandbytes, double quantization, size."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import stored_bytes
from rarefy.formats.nf4 import NF4, dynamic_table, normal_table

# The literals of bitsandbytes and of the paper's appendix E.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
both = pytest.mark.parametrize("nested", [True, False])


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_table_is_the_published_one_to_the_last_bit() -> None:
    assert torch.equal(normal_table(), torch.tensor(PUBLISHED))


def test_the_dynamic_table_has_seven_decades_of_doubling_resolution() -> None:
    table = dynamic_table()
    assert len(table) == len(table.unique()) == 256
    assert table[0].item() == pytest.approx(-0.99296875)
    assert table[-1].item() == 1.0
    assert 0.0 in table
    per_decade = [int(((table >= 10.0**k * 0.1) & (table < 10.0**k)).sum()) for k in range(-6, 1)]
    assert per_decade == [1, 2, 4, 8, 16, 32, 64]


@both
def test_codes_are_those_of_a_search_through_the_table(nested: bool) -> None:
    W = normal(7, 50)  # 350 weights: blocks of 64 cross the rows, and the last one is short
    packed = NF4(nested).fit(W).encode(W)["weight_packed"]
    codes = []
    for block in W.flatten().split(64):
        table = torch.tensor(PUBLISHED)
        distances = (block.unsqueeze(1) / block.abs().max() - table).abs()
        codes += distances.argmin(1).tolist()
    assert packed.tolist() == [
        first << 4 | second for first, second in zip(codes[::2], codes[1::2], strict=True)
    ]


def test_zero_and_the_largest_weight_of_a_block_are_kept() -> None:
    W = normal(8, 96)
    W.view(-1)[::5] = 0
    rounded = NF4(double_quantization=False).fit(W).round(W)
    blocks, after = W.view(-1, 64), rounded.view(-1, 64)
    largest = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(after.gather(1, largest), blocks.gather(1, largest))
    assert not rounded[W == 0].any()
    assert rounded[W != 0].count_nonzero() > 0.8 * (W != 0).sum()


@both
def test_codes_of_the_decoded_matrix_are_the_same(nested: bool) -> None:
    fmt, W = NF4(nested), normal(40, 72)
    packed = fmt.fit(W).encode(W)
    decoded = fmt.decode(packed)
    again = fmt.stored_grid(packed)
    assert torch.equal(again.encode(decoded)["weight_packed"], packed["weight_packed"])
    fresh = fmt.fit(decoded).encode(decoded)
    assert torch.equal(fresh["weight_packed"], packed["weight_packed"])


def test_error_on_normal_weights_is_the_published_one() -> None:
    W = normal(1024, 1024)

    def error(fmt: NF4) -> float:
        return float((fmt.fit(W).round(W) - W).square().mean())

    nested, plain = error(NF4()), error(NF4(double_quantization=False))
    assert plain == pytest.approx(0.0085, abs=2e-4)
    assert nested == pytest.approx(plain, rel=0.01)
    # Fifteen levels over the block's absmax.
    unit = W.view(-1, 64).abs().amax(1, keepdim=True) / 7
    absmax = ((W.view(-1, 64) / unit).round() * unit - W.view(-1, 64)).square().mean()
    assert float(absmax) == pytest.approx(0.0118, abs=3e-4)
    assert plain < float(absmax)


def test_double_quantization_changes_each_absmax_by_little() -> None:
    W = normal(576, 576) * 0.04
    absmax = W.view(-1, 64).abs().amax(1)
    scale = NF4().fit(W).scale
    relative = (scale - absmax).abs().mean() / absmax.mean()
    assert 0.001 < float(relative) < 0.01
    assert float((scale - absmax).mean().abs() / absmax.mean()) < 1e-3


def test_the_mean_is_taken_off_before_the_absmax_is_coded() -> None:
    W = normal(64, 64)
    packed = NF4().fit(W).encode(W)
    absmax = W.view(-1, 64).abs().amax(1)
    assert torch.equal(packed["weight_scale_mean"], absmax.mean().reshape(1))
    assert torch.equal(packed["weight_scale_peak"], (absmax - absmax.mean()).abs().max().reshape(1))


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_size(shape: tuple[int, int]) -> None:
    W = normal(*shape)
    weights = W.numel()
    nested, plain = NF4(), NF4(double_quantization=False)
    for fmt, bits in ((nested, 4.127), (plain, 4.5)):
        stored = sum(t.nbytes for t in fmt.fit(W).encode(W).values())
        assert stored == stored_bytes(fmt, *shape)
        assert 8 * stored / weights == pytest.approx(bits, abs=0.01)


def test_a_block_of_silence_among_loud_ones_stays_silent() -> None:
    W = normal(300, 64)  # 300 blocks: two blocks of blocks
    W[5] *= 1000
    W[7] = 0
    W[9] *= 1e-6
    rounded = NF4().fit(W).round(W)
    assert torch.isfinite(rounded).all()
    assert not rounded[7].any()
    # Its absmax decodes to one thousandfold off, and nothing of its weights is left to amplify.
    assert rounded[9].abs().max() < 1e-2 * W[5].abs().max()
    assert (rounded[5] - W[5]).square().sum() < 0.02 * W[5].square().sum()


def test_weights_that_are_not_finite_are_refused() -> None:
    W = normal(4, 64)
    W[2, 3] = torch.inf
    with pytest.raises(RarefyError, match="NaN or infinite"):
        NF4().fit(W)


def test_a_large_matrix_is_rounded_in_strips_like_a_small_one() -> None:
    W = normal(2, 1500) * torch.ones(1500, 1, 1)  # 4.5 million weights, 64 does not divide a row
    W = W.reshape(3000, 1500).clone()
    W[17] *= 3
    fmt = NF4()
    grid = fmt.fit(W)
    whole = grid.round(W)
    assert torch.equal(torch.cat([grid.round(W[:, :700]), grid.round(W[:, 700:], 700)], 1), whole)
    assert torch.equal(fmt.decode(grid.encode(W)), whole)
