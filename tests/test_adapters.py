"""Model tuners on single linears and tiny models: what moves, what stays, and what is stored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import IDS, layer
from peft import PeftModel
from safetensors.torch import save_file
from tiny import save_tiny, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rarefy.engine.fit import Hooks, fit
from rarefy.engine.paged import PagedAdamW
from rarefy.errors import RarefyError
from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.nf4 import NF4
from rarefy.formats.sparse import Sparse
from rarefy.solvers.gptq import GPTQ
from rarefy.tuners.adapters import peft_files
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, ModelTuner
from rarefy.tuners.full import Full
from rarefy.tuners.lora import LoRA
from rarefy.tuners.qat import QAT
from rarefy.tuners.qlora import QLoRA
from rarefy.tuners.scales import Scales

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.formats.base import Format, Packed

ROWS, COLUMNS = 24, 40
ASYMMETRIC = Int(3, group=16)
F32 = Float("float32")
SPARSE = Sparse(0.6, values=F32)
PATTERN = Sparse(kept=2, of=4, values=F32)


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dense(seed: int = 0, name: str = "model.layers.0.self_attn.q_proj") -> MatrixView:
    return MatrixView(name, drawn(ROWS, COLUMNS, seed) * 0.2)


def stored(fmt: Format, seed: int = 0) -> MatrixView:
    """A matrix as the engine reads it from a checkpoint that an earlier stage has compressed."""
    view = dense(seed)
    packed = fmt.fit(view.weight).encode(view.weight)
    return stored_as(fmt, packed)


def stored_as(fmt: Format, packed: Packed) -> MatrixView:
    return MatrixView(
        "model.layers.0.self_attn.q_proj",
        fmt.decode(packed),
        fmt.stored_grid(packed),
        fmt.stored_support(packed),
        packed=packed,
    )


def sparse_with_zeros_inside(fmt: Sparse) -> MatrixView:
    """Of the weights that are kept, some happen to be zero."""
    W = drawn(ROWS, COLUMNS) * 0.2
    support = fmt.fit(W).support
    assert support is not None
    kept = support.nonzero()[::7]
    W[kept[:, 0], kept[:, 1]] = 0
    grid = fmt.fit(W, support=support)
    view = stored_as(fmt, grid.encode(W))
    assert torch.equal(view.support, support)
    return view


def train(tuner: ModelTuner, adapter: Adapter, steps: int = 12, rate: float = 0.02) -> list[float]:
    """Lower the distance to what another matrix does, as the engine would."""
    moving = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = tuner.optimizer([{"params": moving, "lr": rate}])
    target = dense(seed=5).weight

    def gradients(step: int) -> float:
        torch.manual_seed(step)
        x = drawn(32, COLUMNS, seed=100 + step % 3)
        loss = F.mse_loss(adapter(x), x @ target.T)
        loss.backward()
        return float(loss.detach())

    loop = replace(tuner.loop, steps=steps, schedule="constant", warmup=0)

    return fit(loop, optimizer, gradients, Hooks(lambda progress: adapter.constrain())).losses


CASES: dict[str, tuple[ModelTuner, MatrixView]] = {
    "lora dense": (LoRA(), dense()),
    "lora masked": (LoRA(), stored(SPARSE)),
    "lora masked 2:4": (LoRA(), stored(PATTERN)),
    "lora scale": (LoRA(mask="scale"), stored(SPARSE)),
    "lora plain": (LoRA(mask="plain"), stored(SPARSE)),
    "lora apart": (LoRA(mask="apart"), stored(ASYMMETRIC)),
    "full dense": (Full(), dense()),
    "full sparse": (Full(), stored(SPARSE)),
    "scales": (Scales(), stored(ASYMMETRIC)),
    "scales relative": (Scales(relative=True), stored(Int(4, symmetric=True))),
    "scales sparse": (Scales(), stored(Sparse(0.5, values=Int(4)))),
    "qlora": (QLoRA(rank=4), stored(NF4())),
    "qlora int": (QLoRA(rank=4), stored(ASYMMETRIC)),
    "qlora new": (QLoRA(rank=4), replace(dense(), scheme=NF4())),
    "qat": (QAT(), replace(dense(), scheme=Int(4, symmetric=True))),
    "qat groups": (QAT(), replace(dense(), scheme=ASYMMETRIC)),
    "qat nf4": (QAT(), replace(dense(), scheme=NF4())),
}
every_case = pytest.mark.parametrize("case", CASES)


def begun(case: str) -> tuple[ModelTuner, MatrixView, Adapter]:
    tuner, view = CASES[case]
    adapter = tuner.adapt(view)
    assert adapter is not None
    return tuner, view, adapter


@every_case
def test_without_a_step_nothing_changes_beyond_rounding(case: str) -> None:
    _, view, adapter = begun(case)
    expected = view.weight
    if view.scheme is not None:
        expected = adapter.finish().weight
        assert expected is not None
        assert F.mse_loss(expected, view.weight) < 0.1 * view.weight.square().mean()
    matrix = adapter.matrix()
    # Stored scales are of 16 bits, and so are the products that are stored.
    assert torch.allclose(matrix, expected, rtol=1e-3, atol=1e-6)
    outcome = adapter.finish()
    if outcome.weight is not None:
        assert torch.allclose(outcome.weight, expected, rtol=1e-3, atol=1e-6)


@every_case
def test_training_lowers_the_loss_and_moves_only_parameters(case: str) -> None:
    tuner, view, adapter = begun(case)
    before = {name: b.clone() for name, b in adapter.named_buffers() if b is not None}
    source = view.weight.clone()
    losses = train(tuner, adapter, steps=30)
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    assert all(torch.equal(b, before[n]) for n, b in adapter.named_buffers() if b is not None)
    assert torch.equal(view.weight, source)


@every_case
def test_forward_is_the_product_with_the_matrix(case: str) -> None:
    tuner, _, adapter = begun(case)
    train(tuner, adapter)
    x = drawn(9, COLUMNS, seed=3)
    with torch.no_grad():
        assert torch.allclose(adapter(x), x @ adapter.matrix().T, atol=1e-4)


@every_case
def test_the_finished_matrix_does_what_the_trained_one_did(case: str) -> None:
    tuner, view, adapter = begun(case)
    train(tuner, adapter)
    outcome = adapter.finish()
    weight = view.weight if outcome.weight is None else outcome.weight
    if outcome.adapter:
        A, B = outcome.adapter["lora_A.weight"], outcome.adapter["lora_B.weight"]
        weight = weight + 16 / len(A) * B @ A
    if outcome.grid is not None and outcome.weight is not None:
        decoded = outcome.grid.form.decode(outcome.grid.encode(outcome.weight))
        assert torch.equal(decoded, outcome.grid.round(outcome.weight))
        assert torch.allclose(decoded, outcome.weight, rtol=1e-3)
    if case == "lora plain":
        assert not torch.allclose(weight, adapter.matrix(), atol=1e-3)  # what it is known for
        return
    assert torch.allclose(weight, adapter.matrix().detach(), rtol=1e-3, atol=1e-4)


@every_case
def test_gradients_are_those_of_the_written_out_product(case: str) -> None:
    tuner, _, adapter = begun(case)
    train(tuner, adapter, steps=3)
    x, g = drawn(9, COLUMNS, seed=3), drawn(9, ROWS, seed=4)
    moving = [p for p in adapter.parameters() if p.requires_grad]
    x.requires_grad_()
    ours = torch.autograd.grad((adapter(x) * g).sum(), [x, *moving])
    naive = torch.autograd.grad(((x @ adapter.matrix().T) * g).sum(), [x, *moving])
    for a, b in zip(ours, naive, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# LoRA


def test_pairs_begin_as_in_peft() -> None:
    adapter = LoRA(rank=64).adapt(replace(dense(), weight=drawn(ROWS, 400)))
    pair: Any = adapter.pair
    assert not pair.B.any()
    bound = 400**-0.5
    assert float(pair.A.abs().max()) <= bound
    assert float(pair.A.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    again: Any = LoRA(rank=64).adapt(replace(dense(), weight=drawn(ROWS, 400)))
    other: Any = LoRA(rank=64).adapt(replace(dense(name="other"), weight=drawn(ROWS, 400)))
    assert torch.equal(again.pair.A, pair.A)
    assert not torch.equal(other.pair.A, pair.A)


@pytest.mark.parametrize("mask", ["masked", "scale", "plain"])
@pytest.mark.parametrize("fmt", [SPARSE, PATTERN, Sparse(0.5, values=Float("float16"))])
def test_merging_keeps_the_zeros_and_revives_kept_ones(mask: str, fmt: Sparse) -> None:
    view = sparse_with_zeros_inside(fmt)
    tuner = LoRA(mask=mask)
    adapter = tuner.adapt(view)
    train(tuner, adapter)
    outcome = adapter.finish()
    assert outcome.weight is not None
    assert outcome.grid is not None
    assert view.support is not None
    assert torch.equal(outcome.grid.support, view.support)
    assert not outcome.weight[~view.support].any()
    assert fmt.stored_support(outcome.grid.encode(outcome.weight)).equal(view.support)
    moved = outcome.weight != view.weight
    assert moved[view.support & (view.weight != 0)].float().mean() > 0.9
    if mask == "masked":
        assert outcome.weight[view.support & (view.weight == 0)].all()


def test_the_pair_of_a_masked_matrix_sees_the_support_in_training() -> None:
    view = stored(SPARSE)
    adapter = LoRA().adapt(view)
    train(LoRA(), adapter)
    assert view.support is not None
    assert not adapter.matrix()[~view.support].any()


def test_codes_take_up_no_adapter_unless_apart() -> None:
    for fmt in (Int(4), NF4(), Sparse(0.5, values=Int(4))):
        with pytest.raises(RarefyError, match="cannot take up an adapter; give mask: apart"):
            LoRA().adapt(stored(fmt))
        outcome = LoRA(mask="apart").adapt(stored(fmt)).finish()
        assert outcome.weight is None
        assert sorted(outcome.adapter) == ["lora_A.weight", "lora_B.weight"]


def test_dropout_follows_the_global_seed_and_ends_with_training() -> None:
    adapter: Any = LoRA(dropout=0.5).adapt(dense())
    with torch.no_grad():
        adapter.pair.B.normal_()
    x = drawn(50, COLUMNS)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(adapter(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    adapter.eval()
    assert torch.allclose(adapter(x), x @ adapter.matrix().T, atol=1e-4)


def test_a_dense_matrix_is_not_multiplied_out() -> None:
    adapter = LoRA(rank=2).adapt(dense())
    sizes = kept_for_backward(adapter, drawn(3, COLUMNS).requires_grad_())
    # The frozen matrix itself is needed for the gradient of x; its sum with the pair is not there.
    assert sum(size == ROWS * COLUMNS for size in sizes) == 1


def kept_for_backward(adapter: Adapter, x: torch.Tensor) -> list[int]:
    """Sizes of the tensors that autograd holds on to."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x).sum()
    return sizes


def test_what_else_moves() -> None:
    norm, bias = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"
    table, linear = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"

    def moved(tuner: ModelTuner) -> list[bool]:
        return [tuner.moves(name, name == norm) for name in (norm, bias, table, linear)]

    assert moved(LoRA()) == [False, False, False, False]
    assert moved(LoRA(norms=True)) == [True, False, False, False]
    assert moved(LoRA(biases=True)) == [False, True, False, False]
    assert moved(Full()) == [True, True, False, False]
    assert moved(Full(norms=False, embeddings=True)) == [False, True, True, False]
    assert moved(QAT()) == [True, True, True, False]
    assert moved(Scales()) == [False, False, False, False]
    assert moved(QLoRA()) == [False, False, False, False]


# Full


def test_full_tuning_cannot_revive_zeros_by_momentum_or_decay() -> None:
    view = sparse_with_zeros_inside(SPARSE)
    adapter: Any = Full().adapt(view)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    with torch.no_grad():  # as a state that was kept from the dense model would
        adapter.weight.grad = torch.ones_like(adapter.weight)
    optimizer.step()
    assert adapter.weight[~view.support].any()
    adapter.constrain()
    assert not adapter.weight[~view.support].any()
    x = drawn(9, COLUMNS)
    optimizer.zero_grad()
    adapter(x).square().sum().backward()
    assert not adapter.weight.grad[~view.support].any()
    assert adapter.weight.grad[view.support].count_nonzero() > 0.99 * view.support.sum()
    outcome = adapter.finish()
    assert torch.equal(outcome.grid.support, view.support)


def test_full_tuning_refuses_codes() -> None:
    with pytest.raises(RarefyError, match="codes do not move"):
        Full().adapt(stored(Int(4)))


# PEQA


def sha(packed: Packed) -> str:
    names = [name for name in sorted(packed) if name != "weight_scale"]
    return hashlib.sha256(b"".join(packed[n].numpy().tobytes() for n in names)).hexdigest()


@pytest.mark.parametrize(
    "fmt",
    [
        Int(4),
        ASYMMETRIC,
        Int(2, group=24),
        Int(8, scale_dtype="bfloat16"),
        Int(4, group=16, symmetric=True),
        Sparse(0.5, values=Int(4, group=16)),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_codes_and_zero_points_stay_to_the_byte(fmt: Any, relative: bool) -> None:
    view = stored(fmt)
    tuner = Scales(relative=relative)
    adapter = tuner.adapt(view)
    assert adapter is not None
    assert view.packed is not None
    train(tuner, adapter, steps=40, rate=1e-2)
    outcome = adapter.finish()
    assert outcome.grid is not None
    assert outcome.weight is not None
    packed = outcome.grid.encode(outcome.weight)
    assert sha(packed) == sha(view.packed)
    assert not torch.equal(packed["weight_scale"], view.packed["weight_scale"])
    swapped = outcome.grid.rescaled(fmt.stored_grid(view.packed).scales)
    restored = fmt.decode(packed | {"weight_scale": view.packed["weight_scale"]})
    assert torch.equal(restored, view.weight)
    assert torch.equal(swapped.round(view.weight), view.weight)


def test_eight_bit_codes_are_told_from_decoded_values_and_kept() -> None:
    fmt = Int(8, scale_dtype="bfloat16")
    W = dense().weight.abs()  # codes up to 255, times a scale of eight bits
    packed = fmt.fit(W).encode(W)
    view = stored_as(fmt, packed)
    assert view.grid is not None
    assert sha(view.grid.encode(view.weight)) == sha(packed)
    adapter = Scales().adapt(view)
    assert adapter is not None
    train(Scales(), adapter)
    outcome = adapter.finish()
    assert outcome.grid is not None
    assert outcome.weight is not None
    assert sha(outcome.grid.encode(outcome.weight)) == sha(packed)


@pytest.mark.parametrize("relative", [False, True])
def test_no_scale_falls_to_zero(relative: bool) -> None:
    view = stored(ASYMMETRIC)
    adapter: Any = Scales(relative=relative).adapt(view)
    with torch.no_grad():
        adapter.moving[::2] -= 2
    adapter.constrain()
    outcome = adapter.finish()
    packed = outcome.grid.encode(outcome.weight)
    assert view.packed is not None
    assert sha(packed) == sha(view.packed)
    assert packed["weight_scale"][::2].float().allclose(torch.tensor(2.0**-14), rtol=1e-2)
    assert torch.equal(packed["weight_scale"][1::2], view.packed["weight_scale"][1::2])


def test_scales_of_gptq_with_zero_points() -> None:
    problem = layer(ROWS, COLUMNS, dtype=torch.float32)
    solution = GPTQ().solve(problem, ASYMMETRIC)
    view = stored_as(ASYMMETRIC, solution.grid.encode(solution.weight))
    adapter = Scales().adapt(view)
    assert adapter is not None
    assert torch.allclose(adapter.matrix(), solution.weight, rtol=1e-3, atol=1e-6)
    train(Scales(), adapter)
    outcome = adapter.finish()
    assert sha(outcome.grid.encode(outcome.weight)) == sha(view.packed)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("fmt", [Int(4), ASYMMETRIC, Int(3, group=24)])
def test_the_gradient_of_a_scale_sums_over_its_group(fmt: Int) -> None:
    view = stored(fmt)
    adapter: Any = Scales().adapt(view)
    x, g = drawn(9, COLUMNS), drawn(9, ROWS, seed=1)
    (adapter(x) * g).sum().backward()
    dW = g.T @ x
    assert view.packed is not None
    grid: Any = fmt.stored_grid(view.packed)
    units = grid.codes(view.weight).float()
    size = fmt.group or COLUMNS
    for number, first in enumerate(range(0, COLUMNS, size)):
        span = slice(first, first + size)
        centred = units[:, span] - grid.zero[:, number : number + 1]
        expected = (dW[:, span] * centred).sum(1)
        assert torch.allclose(adapter.moving.grad[:, number], expected, rtol=1e-5, atol=1e-5)


def test_only_scales_move_and_only_where_there_are_any() -> None:
    view = stored(ASYMMETRIC)
    adapter = Scales().adapt(view)
    assert adapter is not None
    assert view.packed is not None
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert count == view.packed["weight_scale"].numel() == ROWS * 3
    assert Scales().adapt(dense()) is None
    assert Scales().adapt(stored(NF4())) is None


def test_scales_keep_no_dense_matrix_for_backward() -> None:
    adapter = Scales().adapt(stored(ASYMMETRIC))
    assert adapter is not None
    assert max(kept_for_backward(adapter, drawn(3, COLUMNS))) <= 3 * COLUMNS


# QLoRA


@pytest.mark.parametrize("fmt", [NF4(), NF4(double_quantization=False), ASYMMETRIC])
def test_qlora_starts_at_the_base_and_keeps_its_bytes(fmt: Any) -> None:
    view = stored(fmt)
    assert view.packed is not None
    before = {k: t.clone() for k, t in view.packed.items()}
    tuner = QLoRA(rank=4)
    adapter: Any = tuner.adapt(view)
    x = drawn(9, COLUMNS)
    assert torch.equal(adapter(x), F.linear(x, fmt.decode(view.packed)))
    train(tuner, adapter)
    assert not torch.equal(adapter(x), F.linear(x, fmt.decode(view.packed)))
    assert all(torch.equal(view.packed[k], t) for k, t in before.items())
    assert all(torch.equal(adapter.stored.tensors()[k], t) for k, t in before.items())
    outcome = adapter.finish()
    assert outcome.weight is None
    assert outcome.grid is None
    assert outcome.adapter["lora_A.weight"].shape == (4, COLUMNS)
    assert outcome.adapter["lora_B.weight"].shape == (ROWS, 4)


def test_qlora_holds_and_saves_nothing_dense() -> None:
    adapter = QLoRA(rank=2).adapt(stored(NF4()))
    held = [*adapter.parameters(), *(b for b in adapter.buffers() if b is not None)]
    assert max(tensor.nbytes for tensor in held) <= ROWS * COLUMNS // 2
    x = drawn(3, COLUMNS).requires_grad_()
    sizes = kept_for_backward(adapter, x)
    assert sizes
    assert max(sizes) <= max(3 * COLUMNS, 2 * COLUMNS, 2 * ROWS)


def test_qlora_packs_a_dense_matrix_first() -> None:
    tuner, view, adapter = begun("qlora new")
    fmt = NF4()
    packed = fmt.fit(view.weight).encode(view.weight)
    x = drawn(9, COLUMNS)
    assert torch.equal(adapter(x), F.linear(x, fmt.decode(packed)))
    train(tuner, adapter)
    outcome = adapter.finish()
    assert outcome.grid is not None
    assert outcome.weight is not None
    again = outcome.grid.encode(outcome.weight)
    assert all(torch.equal(again[k], packed[k]) for k in packed)
    assert outcome.adapter
    with pytest.raises(RarefyError, match="is dense, and qlora trains beside packed matrices"):
        QLoRA().adapt(dense())


def test_qlora_with_a_paged_optimizer_gives_the_same_adapter() -> None:
    found = []
    for paged in (None, 4096):
        tuner = QLoRA(rank=16, paged=paged)
        adapter = tuner.adapt(stored(NF4()))
        train(tuner, adapter, steps=20)
        found.append(adapter.finish().adapter)
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    groups = [{"params": list(QLoRA(rank=16).adapt(dense_nf4()).parameters()), "lr": 1e-3}]
    assert isinstance(QLoRA(paged=4096).optimizer(groups), PagedAdamW)


def dense_nf4() -> MatrixView:
    return replace(dense(), scheme=NF4())


# LLM-QAT


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [None, 16])
def test_symmetric_weights_have_one_level_less_and_are_not_clipped(
    bits: int, dtype: str, group: int | None
) -> None:
    W = drawn(50, 2000 if bits == 8 else 400, seed=bits)
    scheme = Int(bits, group=group, symmetric=True, scale_dtype=dtype)
    adapter = QAT().adapt(MatrixView("m", W, scheme=scheme))
    assert adapter is not None
    seen = adapter.matrix().detach()
    for row, live in zip(seen, W, strict=True):
        for part, weights in zip(
            row.split(group or len(row)), live.split(group or len(live)), strict=True
        ):
            assert len(part.unique()) <= 2**bits - 1
            largest = weights.abs().argmax()
            # Stored scales and products have the precision of their type.
            assert part[largest] == pytest.approx(float(weights[largest]), rel=2.0**-7)
            limit = 2 ** (bits - 1) - 1
            assert float(part.abs().max()) <= float(part[part != 0].abs().min()) * limit * 1.02


def test_the_grid_follows_the_live_weights() -> None:
    _, _, adapter = begun("qat")
    weight: Any = adapter.get_parameter("weight")
    before = adapter.matrix().detach()
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(adapter.matrix(), 2 * before)


def test_gradients_pass_the_rounding_everywhere() -> None:
    _, view, adapter = begun("qat")
    weight: Any = adapter.get_parameter("weight")
    x, g = drawn(9, COLUMNS), drawn(9, ROWS, seed=1)
    (adapter(x) * g).sum().backward()
    assert torch.allclose(weight.grad, g.T @ x, rtol=1e-4, atol=1e-5)
    assert (weight.grad != 0).any(1).float().mean() > 0.99
    assert view.scheme is not None


def test_the_gradient_quirk_of_the_published_code() -> None:
    W = drawn(ROWS, COLUMNS)
    W[3, 4], W[5, 6] = 2.5, -2.0
    view = MatrixView("k_proj", W, scheme=Int(4, symmetric=True))
    x, g = drawn(9, COLUMNS), drawn(9, ROWS, seed=1)
    x[2, 7] = -3.0
    large = W.abs() >= 2
    for clip in (False, True):
        adapter = QAT(clip_gradient=clip, kv_bits=4).adapt(view)
        assert adapter is not None
        source = x.clone().requires_grad_()
        y = adapter(source)
        (y * g).sum().backward()
        weight: Any = adapter.get_parameter("weight")
        assert bool((weight.grad[large] == 0).all()) == clip
        assert (weight.grad[~large] != 0).all()
        assert source.grad is not None
        assert bool(source.grad[2, 7] == 0) == clip
        out = drawn(9, ROWS, seed=2).mul_(2).requires_grad_()
        adapter.output(out).sum().backward()
        assert out.grad is not None
        assert bool((out.grad[out.abs() >= 2] == 0).all()) == clip
        assert (out.grad[out.abs() < 2] == 1).all()


def test_keys_and_values_are_rounded_for_each_token_over_all_heads() -> None:
    tuner = QAT(kv_bits=4)
    y = drawn(9, ROWS, seed=2)
    for node in ("k_proj", "v_proj"):
        adapter = tuner.adapt(replace(dense(name=f"a.{node}"), scheme=Int(8)))
        assert adapter is not None
        rounded = adapter.output(y)
        for token, before in zip(rounded, y, strict=True):
            assert len(token.unique()) <= 15
            scale = before.abs().max() / 7
            assert torch.allclose(token, (before / scale).round() * scale)
    query = tuner.adapt(replace(dense(name="a.q_proj"), scheme=Int(8)))
    assert query is not None
    assert torch.equal(query.output(y), y)
    with pytest.raises(RarefyError, match="gives queries, keys and values at once"):
        tuner.adapt(replace(dense(name="a.qkv_proj"), scheme=Int(8)))


def test_qat_keeps_the_support_of_a_sparse_matrix() -> None:
    fmt = Sparse(0.6, values=Int(4, symmetric=True))
    view = replace(stored(SPARSE), scheme=fmt)
    adapter = QAT().adapt(view)
    assert adapter is not None
    train(QAT(), adapter)
    outcome = adapter.finish()
    assert outcome.weight is not None
    assert outcome.grid is not None
    assert view.support is not None
    assert torch.equal(outcome.grid.support, view.support)
    assert not outcome.weight[~view.support].any()
    assert QAT().adapt(dense()) is None


# Options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"mask": "none"}),
        ("lora", {"rank": 0}),
        ("lora", {"dropout": 1.0}),
        ("full", {"schedule": "square"}),
        ("scales", {"learning_rate": 0.0}),
        ("qlora", {"clip": 0.0}),
        ("qat", {"kv_bits": 9}),
    ],
)
def test_options_outside_their_values_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(RarefyError, match="stage 1"):
        TUNERS.build(name, options, "stage 1")


# peft


def test_peft_opens_the_files_and_computes_what_the_merged_model_does(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    _, model = tiny("llama")
    tuner = LoRA(rank=3, alpha=12.0, mask="apart")
    pairs = {}
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if not name.endswith(("q_proj", "o_proj", "down_proj")):
                continue
            adapter: Any = tuner.adapt(MatrixView(name, module.weight))
            adapter.pair.B.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            pairs[name] = adapter.finish().adapter
            module.weight.copy_(adapter.matrix())
    config, tensors = peft_files(pairs, tuner.rank, tuner.alpha, str(folder))
    written = tmp_path / "adapter"
    written.mkdir()
    save_file(tensors, written / "adapter_model.safetensors")
    (written / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        start = base(input_ids=IDS).logits
        opened = PeftModel.from_pretrained(base, written).eval()(input_ids=IDS).logits
        merged = model(input_ids=IDS).logits
    assert not torch.allclose(start, merged, atol=1e-2)
    assert torch.allclose(opened, merged, atol=1e-4)
