"""The packer against golden words, its own inverse, and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.formats.integer import Int
from rarefy.formats.packing import pack, unpack, words_per_row

BITS = range(1, 9)


def words(packed: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in packed.flatten().tolist()]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=g)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, range(16), [0x76543210, 0xFEDCBA98]),
        (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (8, [0, 127, 128, 255], [0xFF807F00]),
        # The zero points of symmetric grids, worked out in the survey of GPTQ v2 files.
        (3, [4] * 32, [0x24924924, 0x49249249, 0x92492492]),
        (4, [8] * 8, [0x88888888]),
        # An incomplete last word: the high bits are zero.
        (5, [31, 0, 31], [0b11111_00000_11111]),
    ],
)
def test_golden_words(bits: int, codes: list[int], expected: list[int]) -> None:
    assert words(pack(torch.tensor(list(codes)), bits)) == expected


@given(data=st.data(), bits=st.integers(1, 8), columns=st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_is_the_little_endian_bit_stream(data: st.DataObject, bits: int, columns: int) -> None:
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=columns, max_size=columns)
    codes = [data.draw(row), data.draw(row)]
    packed = pack(torch.tensor(codes), bits)
    assert packed.shape == (2, words_per_row(columns, bits))
    assert packed.dtype == torch.int32
    for line, line_words in zip(codes, packed, strict=True):
        stream = sum(code << bits * i for i, code in enumerate(line))
        size = 4 * len(line_words)
        assert line_words.numpy().astype("<i4").tobytes() == stream.to_bytes(size, "little")
    assert unpack(packed, bits, columns).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
def test_packs_the_last_axis_of_any_shape(bits: int) -> None:
    codes = random_codes(bits, 3, 4, 45)
    packed = pack(codes, bits)
    assert packed.shape == (3, 4, words_per_row(45, bits))
    assert torch.equal(unpack(packed, bits, 45).long(), codes)
    assert torch.equal(packed[2, 1], pack(codes[2, 1], bits))
    turned = codes.transpose(0, 2)  # not contiguous
    assert torch.equal(unpack(pack(turned, bits), bits, 3).long(), turned)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("beyond", ["below", "above"])
def test_refuses_a_code_that_would_corrupt_its_neighbours(bits: int, beyond: str) -> None:
    codes = random_codes(bits, 2, 9)
    codes[1, 4] = -1 if beyond == "below" else 1 << bits
    with pytest.raises(RarefyError, match="clamp"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("columns", [1, 32, 77])
def test_equals_compressed_tensors(bits: int, axis: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 5, columns) if axis else random_codes(bits, columns, 5)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits, packed_dim=axis)
    ours = pack(codes, bits) if axis else pack(codes.T, bits).T
    assert torch.equal(ours, theirs)
    read = helpers.unpack_from_int32(ours.contiguous(), bits, codes.shape, packed_dim=axis)
    assert torch.equal(read, signed)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compressed_tensors_decodes_what_we_encode(
    bits: int, group: int | None, symmetric: bool, dtype: str
) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    fmt = Int(bits, group, symmetric, scale_dtype=dtype)
    W = torch.randn(37, 64, generator=torch.Generator().manual_seed(bits))
    packed = fmt.fit(W).encode(W)
    arguments = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = base.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert weight.dtype == getattr(torch, dtype)
    # Their products have the type of the scales.
    assert torch.equal(weight, fmt.decode(packed).to(weight.dtype))
