"""OmniQuant: clipping that only narrows, transformations that leave the function alone."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import IDS, decoded_logits, inputs, moments_of, recipe, reloaded_logits, tensors, words
from tiny import FAMILIES, save_tiny, tiny
from torch.func import functional_call

import rarefy
from rarefy import RarefyError
from rarefy.engine.fit import fit
from rarefy.engine.skeleton import is_transposed
from rarefy.formats.base import Format, Grid
from rarefy.formats.integer import Int
from rarefy.maps.catalogue import map_for
from rarefy.maps.experts import split_experts
from rarefy.tuners.base import BlockView, FoldableEdge, Start
from rarefy.tuners.omniquant import OmniQuant, OmniQuantTuning

if TYPE_CHECKING:
    from pathlib import Path

INT3 = {"*": {"format": "int", "bits": 3, "group": 32}}
INT8 = {"*": {"format": "int", "bits": 8}}


@dataclass(frozen=True)
class Exact(Format):
    """A format that holds every matrix, so that what is left is the transformation alone."""

    learnable = True
    span = None

    def fit(self, weight: torch.Tensor, *_: Any, support: torch.Tensor | None = None) -> Grid:
        return ExactGrid(self, weight.shape[0])

    def decode(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError

    def layout(self, *_: Any) -> Any:
        raise NotImplementedError

    def label(self) -> str:
        return "exact"


class ExactGrid(Grid):
    def __init__(self, form: Format, count: int) -> None:
        self.form, self.count = form, count

    @property
    def scales(self) -> torch.Tensor:
        return torch.ones(self.count, 1)

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        return columns

    def soft(self, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        return weight

    def adjusted(self, *_: Any) -> ExactGrid:
        return self

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        return scales.expand(-1, columns)

    def encode(self, *_: Any) -> Any:
        raise NotImplementedError

    rows = join = encode  # type: ignore[assignment]


def exact(block: BlockView) -> BlockView:
    """The same block, none of whose matrices loses anything."""
    form = Exact()
    matrices = {
        path: Start(start.weight, form.fit(start.weight), None, start.moments)
        for path, start in block.matrices.items()
    }
    parts = vars(block) | {"matrices": matrices}
    return BlockView(**parts)


# One matrix


def view(form: Format, seed: int = 0) -> tuple[BlockView, torch.Tensor, torch.Tensor]:
    """A block of one matrix, inputs to learn from, and others."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(24, 160, generator=g)
    X = inputs(160, seed, tokens=1024).float()
    return BlockView("block", 0, 1, {"linear": Start(W, form.fit(W))}), X[:512], X[512:]


def error(values: torch.Tensor, block: BlockView, X: torch.Tensor) -> torch.Tensor:
    return ((values - block.matrices["linear"].weight) @ X.T).square().mean()


def learned(tuner: OmniQuant, block: BlockView, X: torch.Tensor) -> OmniQuantTuning:
    tuning = tuner.begin(block)

    def gradients(step: int) -> float:
        loss = error(tuning.parameters()["linear.weight"], block, X)
        loss.backward()
        return float(loss.detach())

    fit(tuner.loop, tuner.optimizer(tuning.groups), gradients)
    return tuning


@pytest.mark.parametrize("group", [None, 64])  # 64 does not divide 160
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_narrows_and_helps_on_other_inputs(group: int | None, symmetric: bool) -> None:
    block, X, unseen = view(Int(3, group=group, symmetric=symmetric))
    start = block.matrices["linear"]
    tuning = learned(OmniQuant(steps=200), block, X)
    weight, grid = tuning.finish().matrices["linear"]
    assert error(weight, block, unseen) < 0.9 * error(start.grid.round(start.weight), block, unseen)
    assert (grid.scales <= start.grid.scales).all()
    assert (grid.scales < 0.97 * start.grid.scales).float().mean() > 0.5
    if symmetric:
        assert not tuning.beta
    else:
        apart = (tuning.gamma["linear"] - tuning.beta["linear"]).abs() > 0.05
        assert apart.float().mean() > 0.5


def test_what_was_learned_from_is_what_is_stored() -> None:
    block, X, _ = view(Int(3, group=64))
    tuning = learned(OmniQuant(steps=20, lwc_lr=0.05), block, X)
    weight, grid = tuning.finish().matrices["linear"]
    assert torch.equal(tuning.parameters()["linear.weight"].detach(), weight)
    assert torch.equal(grid.form.decode(grid.encode(weight)), weight)


def test_it_starts_two_percent_narrower_unless_told_otherwise() -> None:
    block, _, _ = view(Int(3, group=64))
    start = block.matrices["linear"]
    _, narrow = OmniQuant(steps=0).begin(block).finish().matrices["linear"]
    ratio = narrow.scales / start.grid.scales
    assert (ratio - torch.tensor(4.0).sigmoid()).abs().max() < 1e-3
    weight, _ = OmniQuant(steps=0, init=20.0).begin(block).finish().matrices["linear"]
    assert torch.equal(weight, start.grid.round(start.weight))


def test_both_kinds_of_numbers_have_their_rates() -> None:
    block, X, _ = view(Int(3))
    edge = FoldableEdge("edge", {"norm.weight": torch.arange(160)}, {}, 160)
    edge.readers["linear.weight"] = torch.arange(160)
    start = block.matrices["linear"]
    matrices = {"linear": Start(start.weight, start.grid, None, moments_of(X))}
    block = BlockView("block", 0, 1, matrices, {"norm.weight": torch.ones(160)}, (), (edge,))
    tuner = OmniQuant(let=True, lwc_lr=0.25, let_lr=0.125)
    tuning = tuner.begin(block)
    assert [(group["lr"], len(group["params"])) for group in tuning.groups] == [
        (0.25, 2),
        (0.125, 1),
    ]
    optimizer = tuner.optimizer(tuning.groups)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    before = {name: leaf.detach().clone() for name, leaf in tuning.s.items()}
    tuning.parameters()["linear.weight"].square().sum().backward()
    optimizer.step()
    # The first step of Adam has the size of the learning rate.
    assert (tuning.s["edge"] - before["edge"]).abs().detach().median() == pytest.approx(0.125, 1e-3)
    assert not OmniQuant(lwc=False, let=True).begin(block).gamma


# The transformation


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the engine shows the tuner of every block of a family."""

    def see(family: str) -> list[BlockView]:
        seen: list[BlockView] = []
        begin = OmniQuant.begin

        def spy(self: OmniQuant, block: BlockView) -> OmniQuantTuning:
            seen.append(copy.deepcopy(block))
            return begin(self, block)

        with monkeypatch.context() as patch:
            patch.setattr(OmniQuant, "begin", spy)
            run(tmp_path, save_tiny(family, tmp_path / family), tune(0, let=True), name="seen")
        return seen

    return see


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str = "out") -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def tune(steps: int, schemes: dict[str, Any] = INT3, **options: Any) -> dict[str, Any]:
    return {"tuner": "omniquant", "steps": steps, "rows": 2, "schemes": schemes} | options


class Whole:
    """A tiny model, the parameters of whose blocks can be replaced."""

    def __init__(self, family: str) -> None:
        config, self.model = tiny(family)
        table = map_for(config)
        assert table is not None
        self.prefix = table.blocks
        for block in self.model.get_submodule(table.blocks) if table.experts else ():
            split_experts(block, table.experts)
        self.flipped = {f"{n}.weight" for n, m in self.model.named_modules() if is_transposed(m)}

    @torch.no_grad()
    def logits(self, blocks: dict[int, dict[str, torch.Tensor]]) -> torch.Tensor:
        named = {f"{self.prefix}.{i}.{n}": v for i, b in blocks.items() for n, v in b.items()}
        shown = {n: v.T if n in self.flipped and v.ndim == 2 else v for n, v in named.items()}
        options = {"input_ids": IDS, "use_cache": False}
        result: torch.Tensor = functional_call(self.model, shown, (), options).logits
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_random_factors_everywhere_keep_the_function(views: Any, family: str) -> None:
    whole = Whole(family)
    before = whole.logits({})
    g = torch.Generator().manual_seed(0)
    shown, stored, moved = {}, {}, set()
    for block in views(family):
        tuning = OmniQuant(let=True).begin(exact(block))
        assert tuning.s.keys() == {edge.name for edge in block.edges}
        with torch.no_grad():
            for s in tuning.s.values():
                s.copy_(torch.randn(s.shape, generator=g).mul(0.7).exp())
            shown[block.index] = tuning.parameters()
        tuned = tuning.finish()
        stored[block.index] = tuned.others | {
            f"{path}.weight": weight for path, (weight, _) in tuned.matrices.items()
        }
        moved |= set(tuned.others)
    assert len(shown) == whole.model.config.num_hidden_layers
    assert moved
    for values in (shown, stored):
        after = whole.logits(values)
        assert not torch.equal(after, before)
        assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_a_wrong_channel_would_show(views: Any) -> None:
    """The check above can fail: heads shared in another order are not a fold."""
    whole = Whole("llama")
    [block, *_] = views("llama")
    edges = tuple(
        FoldableEdge(e.name, e.writers, {n: c.flip(0) for n, c in e.readers.items()}, e.width)
        for e in block.edges
        if e.name == "value"
    )
    tuning = OmniQuant(let=True).begin(BlockView(**(vars(exact(block)) | {"edges": edges})))
    with torch.no_grad():
        tuning.s["value"].copy_(torch.linspace(0.5, 2, 32))
    before = whole.logits({})
    after = whole.logits({0: tuning.parameters()})
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_factors_start_at_those_of_smoothquant(views: Any) -> None:
    [block, *_] = views("llama")
    tuning = OmniQuant(let=True, alpha=0.3).begin(block)
    edges = {edge.name: edge for edge in block.edges}
    for name, channels in (("attn_in", 64), ("value", 32), ("mlp_inner", 96)):
        readers = [p.removesuffix(".weight") for p in edges[name].readers]
        at = edges[name].readers[f"{readers[0]}.weight"]
        for channel in range(0, channels, 7):
            columns = (at == channel).nonzero().flatten().tolist()
            assert len(columns) == (2 if name == "value" else 1)
            starts = [block.matrices[path] for path in readers]
            X = max(float(starts[0].moments.peak[j]) for j in columns)
            W = max(float(s.weight[:, j].abs().max()) for s in starts for j in columns)
            assert float(tuning.s[name][channel]) == pytest.approx(X**0.3 / W**0.7, rel=1e-5)


def test_silent_channels_start_as_they_are_and_small_factors_are_held(views: Any) -> None:
    [block, *_] = views("llama")
    moments = block.matrices["mlp.down_proj"].moments
    assert moments is not None
    moments.peak[3] = 0
    moments.peak[5] = 1e-12 + 2e-5 * float(moments.peak.max())
    tuning = OmniQuant(let=True, alpha=1.0).begin(exact(block))
    s = tuning.s["mlp_inner"]
    assert s[3].item() == 1
    assert s[5].item() == pytest.approx(0.01)
    with torch.no_grad():
        s[7] = -3.0
    values = tuning.parameters()
    before = block.matrices["mlp.down_proj"].weight[:, 7]
    torch.testing.assert_close(values["mlp.down_proj.weight"][:, 7].detach(), 0.01 * before)
    [slope] = torch.autograd.grad(values["mlp.down_proj.weight"][:, 7].sum(), s)
    assert slope[7].item() == pytest.approx(float(before.sum()), rel=1e-4)


def edge_view(form: Int) -> tuple[BlockView, torch.Tensor]:
    """Two matrices with an edge between them, in float64."""
    g = torch.Generator().manual_seed(3)
    X = inputs(12, 0, tokens=64)
    first, second = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((18, 12), (5, 18))
    )
    edge = FoldableEdge(
        "inner", {"first.weight": torch.arange(18)}, {"second.weight": torch.arange(18)}, 18
    )
    matrices = {
        "first": Start(first, form.fit(first), None, moments_of(X)),
        "second": Start(second, form.fit(second), None, moments_of(X @ first.T)),
    }
    return BlockView("block", 0, 1, matrices, edges=(edge,)), X


def naive(
    W: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, form: Int, follow: bool
) -> torch.Tensor:
    """Clip the range of a transformed matrix and round, by automatic differentiation.

    Without ``follow`` the range is a constant.
    """

    def ste(x: torch.Tensor, kind: torch.dtype | None = None) -> torch.Tensor:
        return x + ((x.round() if kind is None else x.to(kind).double()) - x).detach()

    groups = W.reshape(len(W), -1, form.group or W.shape[1])
    ends = groups if follow else groups.detach()
    lo, hi = ends.amin(-1).clamp(max=0), ends.amax(-1).clamp(min=0)
    grid = form.fit(W.detach())
    if form.symmetric:
        reach = torch.maximum(-lo, hi)
        reach = reach * (grid.scale * form.levels / 2 / reach).detach()
        s = ste(gamma * 2 * reach / form.levels, torch.float16)
        z = torch.full_like(s, 1 << (form.bits - 1))
    else:
        # The grid's own ends, where zero points are whole numbers, in the extremes' place.
        lo = lo * (-grid.zero * grid.scale / lo).detach().nan_to_num()
        hi = hi * ((form.levels - grid.zero) * grid.scale / hi).detach().nan_to_num()
        s = ste((gamma * hi - beta * lo) / form.levels, torch.float16)
        z = ste(-beta * lo / s)
    s, z = s[..., None], z[..., None]
    codes = (ste(groups / s) + z).clamp(0, form.levels)
    return (s * (codes - z)).reshape(W.shape)


@pytest.mark.parametrize("form", [Int(4, group=6, symmetric=True), Int(8, group=6), Int(6)])
def test_ranges_follow_the_transformed_weights(form: Int) -> None:
    """The gradients are those of the graph that has the ranges in it, and not of another."""
    block, X = edge_view(form)
    Y = X @ block.matrices["first"].weight.T @ block.matrices["second"].weight.T
    tuning = OmniQuant(let=True, init=2.0).begin(block)
    clip = torch.tensor(2.0).double().sigmoid()

    def slope(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        slopes = torch.cos(torch.arange(Y.numel(), dtype=Y.dtype)).reshape(Y.shape)
        loss = ((X @ first.T @ second.T) * slopes).sum()
        [found] = torch.autograd.grad(loss, tuning.s["inner"])
        return found

    values = tuning.parameters()
    mine = slope(values["first.weight"], values["second.weight"])
    weights = [block.matrices[path].weight for path in ("first", "second")]

    def theirs(follow: bool) -> torch.Tensor:
        s = tuning.s["inner"]
        moved = weights[0] / s[:, None], weights[1] * s
        return slope(*(naive(W, clip, clip, form, follow) for W in moved))

    torch.testing.assert_close(mine, theirs(True), rtol=1e-9, atol=1e-9)
    assert (mine - theirs(False)).norm() > 0.1 * mine.norm()


class Block:
    """A tiny block with a few channels that are loud in its normed inputs and quiet in weights."""

    def __init__(self) -> None:
        self.model = tiny("llama")[1].requires_grad_(False)
        self.module = self.model.model.layers[0]
        attention, mlp = self.module.self_attn, self.module.mlp
        for norm, readers in (
            (self.module.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (self.module.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[::16] *= 30
            for reader in readers:
                reader.weight[:, ::16] /= 30

    def feed(self, seed: int, rows: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        hidden: torch.Tensor = self.model.model.embed_tokens(
            torch.randint(256, (rows, 32), generator=g)
        )
        return hidden

    def run(self, values: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        places = self.model.model.rotary_emb(hidden, torch.arange(32)[None])
        out = functional_call(self.module, values, (hidden,), {"position_embeddings": places})
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def view(self, shown: BlockView, form: Int, hidden: torch.Tensor) -> BlockView:
        """As the engine shows it, with this module's numbers."""
        seen: dict[str, torch.Tensor] = {}

        def watch(path: str) -> Any:
            return lambda _, args: seen.update({path: args[0].flatten(0, 1)})

        hooks = [
            self.module.get_submodule(path).register_forward_pre_hook(watch(path))
            for path in shown.matrices
        ]
        self.run({}, hidden)
        for hook in hooks:
            hook.remove()
        matrices = {}
        for path in shown.matrices:
            W = self.module.get_submodule(path).weight
            matrices[path] = Start(W, form.fit(W), None, moments_of(seen[path]))
        others = {n: p for n, p in self.module.named_parameters() if n in shown.others}
        return BlockView(**(vars(shown) | {"matrices": matrices, "others": others}))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """4-bit inputs, a scale a token, with the gradient of the scale: it is what LET can lower."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    u = x / scale
    return (u + (u.round() - u).detach()) * scale


def test_with_rounded_inputs_transformations_help_on_other_inputs(views: Any) -> None:
    block = Block()
    hidden, unseen = block.feed(0, 32), block.feed(1, 16)
    target, wanted = block.run({}, hidden), block.run({}, unseen)
    [shown, *_] = views("llama")
    begun = block.view(shown, Int(8), hidden)
    for path in begun.matrices:
        module = block.module.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))

    def left(tuner: OmniQuant) -> float:
        tuning = tuner.begin(begun)

        def gradients(step: int) -> float:
            at = slice(2 * step % 32, 2 * step % 32 + 2)
            loss = tuner.loss(block.run(tuning.parameters(), hidden[at]), target[at])
            loss.backward()
            return float(loss.detach())

        fit(tuner.loop, tuner.optimizer(tuning.groups), gradients)
        tuned = tuning.finish()
        final = tuned.others | {f"{p}.weight": W for p, (W, _) in tuned.matrices.items()}
        return float(tuner.loss(block.run(final, unseen), wanted))

    clipped = left(OmniQuant(steps=32))
    first = left(OmniQuant(steps=0, let=True, alpha=0.0))
    learned = left(OmniQuant(steps=64, let=True, alpha=0.0, let_lr=0.02))
    assert first < 0.5 * clipped
    assert learned < 0.9 * first


# The engine


def blocks(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "manifest.json").read_text())["history"]
    found: list[dict[str, Any]] = history[-1]["blocks"]
    return found


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def test_without_steps_and_clipping_it_is_rounding_to_nearest(tmp_path: Path, dense: Path) -> None:
    rounded = tensors(run(tmp_path, dense, {"solver": "nearest", "schemes": INT3}, name="rtn"))
    same = tensors(run(tmp_path, dense, tune(0, init=20.0), name="same"))
    assert same.keys() == rounded.keys()
    assert all(torch.equal(same[name], rounded[name]) for name in rounded)
    clipped = tensors(run(tmp_path, dense, tune(5), name="clipped"))
    assert clipped.keys() == rounded.keys()
    changed = {name for name in rounded if not torch.equal(clipped[name], rounded[name])}
    assert changed
    assert all("weight_" in name for name in changed)


@pytest.mark.parametrize("let", [False, True])
def test_every_block_comes_closer_to_the_dense_one(tmp_path: Path, dense: Path, let: bool) -> None:
    before = blocks(run(tmp_path, dense, tune(0, let=let, init=20.0), name="before"))
    after = blocks(run(tmp_path, dense, tune(40, let=let), name="after"))
    assert len(after) == 3
    for plain, tuned in zip(before, after, strict=True):
        assert tuned["left"] < plain["left"]
        assert all(0.5 < share < 1 for share in tuned["gamma"].values())
        assert ("s" in tuned) == let


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "phi3"])
def test_a_transformed_model_is_stored_like_any_other(tmp_path: Path, family: str) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    rounded = run(tmp_path, dense, {"solver": "nearest", "schemes": INT8}, name="rtn")
    tuned = run(tmp_path, dense, tune(2, INT8, let=True), name="tuned")
    mine, theirs = tensors(tuned), tensors(rounded)
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    norms = [n for n in mine if "norm" in n and ".0." in n and n.endswith("weight")]
    assert any(not torch.equal(mine[n], theirs[n]) for n in norms)
    logits = reloaded_logits(tuned)
    torch.testing.assert_close(logits, decoded_logits(family, tuned), rtol=1e-4, atol=1e-4)
    wanted = Whole(family).logits({})
    assert (logits - wanted).norm() < 0.05 * wanted.norm()


def test_what_cannot_be_learned_is_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(RarefyError, match="no range to clip"):
        run(tmp_path, dense, tune(1, {"*": {"format": "float"}}), name="float")
    for options, words_of_it in (
        ({"lwc": False}, "nothing would be learned"),
        ({"alpha": 2.0}, r"alpha must lie in 0\.\.1"),
        ({"lwc_lr": 0.0}, "above 0"),
        ({"stream": "both"}, "stream must be dense or prefix"),
        ({"steps": -1}, "at least 0"),
    ):
        with pytest.raises(RarefyError, match=words_of_it):
            run(tmp_path, dense, tune(1) | options, name="options")
    block, _, _ = view(Int(3))
    with pytest.raises(RarefyError, match="set let: false"):
        OmniQuant(let=True).begin(block)
