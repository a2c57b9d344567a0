"""The paged optimizer: AdamW's numbers bit for bit, within its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from rarefy.engine.fit import Hooks, Loop, Progress, fit
from rarefy.engine.paged import PagedAdamW
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

BUDGET = 64 * 1024


class Killed(Exception):
    pass


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    # 37 and 91 leave odd tails; 91 x 301 takes several pages.
    return nn.Sequential(nn.Linear(37, 91), nn.Tanh(), nn.Linear(91, 301))


def gradients(net: nn.Module, step: int) -> float:
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 37, generator=g), torch.randn(8, 301, generator=g)
    loss = (net(x) - y).square().mean()
    loss.backward()
    return float(loss.detach())


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        gradients(net, step)
        optimizer.step()


def plain(net: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), foreach=False, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_are_those_of_adamw_bit_for_bit(decay: float) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": decay}
    ours, theirs, start = model(), model(), model()
    paged = PagedAdamW(ours.parameters(), budget=BUDGET, **options)
    train(ours, paged, 20)
    train(theirs, plain(theirs, **options), 20)
    assert same(ours, theirs)
    assert not same(ours, start)
    state = sum(2 * p.numel() * 4 for p in ours.parameters())
    assert state > 3 * BUDGET
    assert paged.evictions >= 20  # every step visits more than the budget holds
    assert BUDGET // 2 < paged.peak <= BUDGET


def test_nothing_is_evicted_when_everything_fits() -> None:
    net = model()
    paged = PagedAdamW(net.parameters(), budget=1 << 24)
    train(net, paged, 3)
    assert paged.evictions == 0
    assert paged.peak == sum(2 * p.numel() * 4 for p in net.parameters())


def test_state_travels_to_and_from_adamw() -> None:
    one, other, whole = model(), model(), model()
    paged = PagedAdamW(one.parameters(), lr=1e-2, budget=BUDGET)
    train(one, paged, 4)
    state = paged.state_dict()
    assert state["state"][0]["exp_avg"].shape == one[0].weight.shape
    other.load_state_dict(one.state_dict())
    unpaged = plain(other)
    unpaged.load_state_dict(state)
    train(other, unpaged, 4, first=4)
    back = model()
    back.load_state_dict(other.state_dict())
    again = PagedAdamW(back.parameters(), budget=BUDGET)
    again.load_state_dict(unpaged.state_dict())
    train(back, again, 4, first=8)
    train(whole, plain(whole, lr=1e-2, weight_decay=0.0), 12)
    assert same(back, whole)


def test_a_run_is_taken_up_where_it_stopped() -> None:
    loop = Loop(9, schedule="linear", warmup=2)
    whole, part = model(), model()
    fit(
        loop,
        PagedAdamW(whole.parameters(), lr=1e-2, budget=BUDGET),
        lambda step: gradients(whole, step),
    )
    stopped = PagedAdamW(part.parameters(), lr=1e-2, budget=BUDGET)

    kept: dict[str, Any] = {}

    def after(progress: Progress) -> None:
        if progress.step == 5:
            copied = {
                i: {k: v.clone() for k, v in entry.items()}
                for i, entry in stopped.state_dict()["state"].items()
            }
            kept.update(state=copied, model={k: v.clone() for k, v in part.state_dict().items()})
            raise Killed

    with pytest.raises(Killed):
        fit(loop, stopped, lambda step: gradients(part, step), Hooks(after))
    resumed = model()
    resumed.load_state_dict(kept["model"])
    taken_up = PagedAdamW(resumed.parameters(), lr=1e-2, budget=BUDGET)
    groups = taken_up.state_dict()["param_groups"]
    taken_up.load_state_dict({"state": kept["state"], "param_groups": groups})
    fit(loop, taken_up, lambda step: gradients(resumed, step), progress=Progress(step=5))
    assert same(resumed, whole)


def test_parameters_without_gradients_stay(tmp_path: Path) -> None:
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    paged = PagedAdamW(net.parameters(), budget=BUDGET, folder=tmp_path)
    train(net, paged, 2)
    assert torch.equal(net[0].weight, before)
    assert sorted(paged.state_dict()["state"]) == [2, 3]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == 2 * 4 * (91 * 301 + 301)


def test_half_precision_state() -> None:
    a = nn.Parameter(torch.linspace(-1, 1, 5000, dtype=torch.bfloat16))
    b = nn.Parameter(a.detach().clone())
    paged = PagedAdamW([a], budget=4096)
    theirs = torch.optim.AdamW([b], foreach=False, weight_decay=0.0)
    for step in range(5):
        a.grad = torch.sin(torch.arange(5000) + step).to(torch.bfloat16)
        b.grad = a.grad.clone()
        paged.step()
        theirs.step()
    assert torch.equal(a, b)
    assert paged.evictions > 0


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(RarefyError, match="give at least 1024"):
        PagedAdamW(model().parameters(), budget=1000)
