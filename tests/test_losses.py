"""Losses: known values, limits and bounds, shortened targets, chunks, half precision."""

from __future__ import annotations

from math import log

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.losses import rowwise as rowwise_module
from rarefy.losses.base import Loss, Reading, Target, TopK
from rarefy.losses.cross_entropy import cross_entropy, log_likelihood
from rarefy.losses.divergence import top_k
from rarefy.losses.forward_kl import ForwardKL
from rarefy.losses.hidden import HiddenMSE
from rarefy.losses.jsd import JSD
from rarefy.losses.reverse_kl import ReverseKL
from rarefy.losses.rowwise import rowwise

DIVERGENCES: list[Loss] = [ForwardKL(), ReverseKL(), JSD(0.1), JSD(0.5), JSD(0.9, rescale=True)]
every_divergence = pytest.mark.parametrize("loss", DIVERGENCES, ids=str)


def logits(seed: int, rows: int = 9, width: int = 24, scale: float = 2.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, width, generator=g, dtype=torch.float64)


def value(loss: Loss, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return loss.per_token(Reading(student), Target(logits=teacher))


def test_two_outcomes_by_hand() -> None:
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()
    forward = 0.75 * log(1.5) + 0.25 * log(0.5)
    reverse = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    assert float(value(ForwardKL(), teacher, student)) == pytest.approx(forward, abs=1e-6)
    assert float(value(ReverseKL(), teacher, student)) == pytest.approx(reverse, abs=1e-6)
    # The mixture of JSD(0.2) is 0.55 and 0.45.
    mixed = 0.2 * (0.75 * log(0.75 / 0.55) + 0.25 * log(0.25 / 0.45))
    mixed += 0.8 * (0.5 * log(0.5 / 0.55) + 0.5 * log(0.5 / 0.45))
    assert float(value(JSD(0.2), teacher, student)) == pytest.approx(mixed, abs=1e-6)


@pytest.mark.parametrize(("beta", "bound"), [(0.1, 0.325083), (0.5, 0.693147), (0.9, 0.325083)])
def test_jsd_is_bounded_and_the_bound_is_that_of_disjoint_supports(
    beta: float, bound: float
) -> None:
    apart = torch.full((1, 6), -torch.inf, dtype=torch.float64)
    teacher, student = apart.clone(), apart.clone()
    teacher[0, :3], student[0, 3:] = logits(0, 1, 3), logits(1, 1, 3)
    assert float(value(JSD(beta), teacher, student)) == pytest.approx(bound, abs=1e-6)
    near = value(JSD(beta), logits(2, 500, scale=5), logits(3, 500, scale=5))
    assert near.max() < bound
    assert near.max() > 0.8 * bound


def test_jsd_tends_to_both_divergences() -> None:
    teacher, student = logits(0, scale=1), logits(1, scale=1)
    low = value(JSD(1e-4), teacher, student) / 1e-4
    high = value(JSD(1 - 1e-4), teacher, student) / 1e-4
    torch.testing.assert_close(low, value(ForwardKL(), teacher, student), rtol=0.01, atol=0)
    torch.testing.assert_close(high, value(ReverseKL(), teacher, student), rtol=0.01, atol=0)


def test_rescaled_jsd_has_gradients_of_the_size_of_the_divergence() -> None:
    teacher, sizes = logits(0, scale=1), {}
    for loss in (ForwardKL(), JSD(0.05), JSD(0.05, rescale=True)):
        student = logits(1, scale=1).requires_grad_()
        value(loss, teacher, student).sum().backward()
        assert student.grad is not None
        sizes[loss] = float(student.grad.norm())
    assert sizes[JSD(0.05)] < 0.1 * sizes[ForwardKL()]
    assert sizes[JSD(0.05, rescale=True)] == pytest.approx(sizes[ForwardKL()], rel=0.25)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.5])
def test_jsd_refuses_the_ends(beta: float) -> None:
    with pytest.raises(ValueError, match="use forward-kl or reverse-kl"):
        JSD(beta)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_entries_are_the_whole_distribution(loss: Loss, temperature: float) -> None:
    teacher, a, b = logits(0), logits(1).requires_grad_(), logits(1).requires_grad_()
    top = top_k(teacher, teacher.shape[1], temperature)
    short = loss.per_token(Reading(a), Target(top=top), temperature)
    whole = loss.per_token(Reading(b), Target(logits=teacher), temperature)
    torch.testing.assert_close(short, whole, rtol=1e-10, atol=1e-12)
    short.sum().backward()
    whole.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@every_divergence
def test_shortening_never_raises_a_divergence(loss: Loss) -> None:
    teacher, student = logits(0, 200), logits(1, 200)
    last = torch.zeros(200, dtype=torch.float64)
    for k in (1, 2, 4, 8, 16, 24):
        found = loss.per_token(Reading(student), Target(top=top_k(teacher, k)))
        # Entries of a smaller k are merged ones of a larger k.
        assert (found >= last - 1e-12).all()
        last = found
    assert last.mean() > 0.1


def test_without_a_tail_the_entries_are_the_teacher() -> None:
    teacher, student = logits(0), logits(1)
    top = top_k(teacher, 3, tail=False)
    only = torch.full_like(teacher, -torch.inf).scatter(1, top.indices, top.log_probs)
    found = ForwardKL().per_token(Reading(student), Target(top=top))
    torch.testing.assert_close(found, value(ForwardKL(), only, student), rtol=1e-10, atol=1e-12)
    for loss in (ReverseKL(), JSD()):
        with pytest.raises(RarefyError, match=r"needs logits or top-k, and .* top-k without tail"):
            loss.per_token(Reading(student), Target(top=top))


def test_a_tail_too_small_for_one_minus_the_rest() -> None:
    """In float32 the entries' sum rounds to 1; the tail is summed itself."""
    teacher = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    top = top_k(teacher, 1)
    assert top.tail is not None
    expected = torch.log_softmax(teacher.double(), -1)[0, 1:].logsumexp(0)
    assert float(top.tail) == pytest.approx(float(expected), abs=1e-5)
    student = torch.tensor([[30.0, 1.0, 2.0, 3.0]], requires_grad=True)
    loss = ForwardKL().per_token(Reading(student), Target(top=top))
    loss.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(loss).all()


@every_divergence
def test_tokens_forbidden_on_both_sides_count_nothing(loss: Loss) -> None:
    teacher, student = logits(0), logits(1)
    banned_teacher, banned = teacher.clone(), student.clone().requires_grad_()
    with torch.no_grad():
        for side in (banned_teacher, banned):
            side[:, 20:] = -torch.inf
    found = value(loss, banned_teacher, banned)
    expected = value(loss, teacher[:, :20], student[:, :20])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    found.sum().backward()
    assert banned.grad is not None
    assert (banned.grad[:, 20:] == 0).all()
    assert torch.isfinite(banned.grad).all()


def test_a_token_that_only_the_teacher_excludes_costs_an_enormous_loss() -> None:
    teacher = torch.tensor([[0.0, -torch.inf]])
    assert float(value(ReverseKL(), teacher, torch.zeros(1, 2))) > 1e20


@every_divergence
def test_chunks_do_not_matter(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = logits(0, 50).float()
    found = []
    for chunk in (1, 24 * 7, 1 << 20):
        monkeypatch.setattr(rowwise, "__defaults__", (chunk,))
        student = logits(1, 50).float().requires_grad_()
        values = value(loss, teacher, student)
        (values * torch.arange(50)).sum().backward()
        found.append((values.detach(), student.grad))
    for values, slope in found[1:]:
        torch.testing.assert_close(values, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(slope, found[0][1], rtol=1e-6, atol=1e-6)


def test_only_a_chunk_is_handed_to_the_rule_at_a_time() -> None:
    seen = []

    def rule(z: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((part.start, part.stop, len(z)))
        return z.sum(-1), torch.ones_like(z)

    rowwise(torch.zeros(7, 10), rule, 30)
    assert seen == [(0, 3, 3), (3, 6, 3), (6, 7, 1)]
    assert rowwise_module.CHUNK * 4 <= 8 << 20


@every_divergence
def test_half_precision_is_computed_in_single(loss: Loss) -> None:
    teacher, student = logits(0).bfloat16(), logits(1).bfloat16().requires_grad_()
    values = value(loss, teacher, student)
    assert values.dtype == torch.float32
    expected = value(loss, teacher.float(), student.detach().float())
    assert torch.equal(values.detach(), expected)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    student = logits(1).requires_grad_()
    total = value(ForwardKL(), logits(0), student).sum()
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def test_inputs_are_untouched_and_no_graph_is_kept_without_gradients() -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    before = teacher.clone(), student.detach().clone()
    with torch.no_grad():
        assert not value(ReverseKL(), teacher, student).requires_grad
    value(ReverseKL(), teacher, student).sum().backward()
    assert torch.equal(teacher, before[0])
    assert torch.equal(student.detach(), before[1])


def test_cross_entropy_is_that_of_torch() -> None:
    z, labels = logits(4).requires_grad_(), torch.arange(9)
    expected = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(z, labels), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(log_likelihood(z, labels), -expected.detach())
    assert not log_likelihood(z, labels).requires_grad


def test_no_tokens_give_no_loss() -> None:
    z = torch.zeros(0, 5, requires_grad=True)
    total = value(ForwardKL(), torch.zeros(0, 5), z).sum()
    total.backward()
    assert float(total.detach()) == 0


def test_refusals() -> None:
    top = top_k(logits(0), 4, temperature=2.0)
    with pytest.raises(RarefyError, match=r"temperature 2\.0 and the loss 1\.0"):
        ForwardKL().per_token(Reading(logits(1)), Target(top=top))
    with pytest.raises(RarefyError, match="share one vocabulary"):
        value(ForwardKL(), logits(0, 9, 30), logits(1))
    wide, narrow = (torch.ones(9, 8),), (torch.ones(9, 6),)
    with pytest.raises(RarefyError, match="hidden states of one shape"):
        HiddenMSE().per_token(Reading(logits(0), narrow), Target(states=wide))


def test_relative_states_ignore_the_size_of_a_token() -> None:
    t, s = logits(0), logits(1)
    scale = torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    plain = HiddenMSE().per_token(Reading(s, (s,)), Target(states=(t,)))
    scaled = HiddenMSE().per_token(Reading(s, (s * scale,)), Target(states=(t * scale,)))
    torch.testing.assert_close(scaled, plain)
    raw = HiddenMSE(relative=False).per_token(Reading(s, (s * scale,)), Target(states=(t * scale,)))
    assert raw.max() > 1e6 * raw.min()


def test_entries_are_the_largest_and_sum_to_one_with_the_tail() -> None:
    teacher = logits(0, 100)
    top: TopK = top_k(teacher, 5, temperature=1.7)
    assert top.tail is not None
    total = top.log_probs.exp().sum(1) + top.tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    whole = torch.log_softmax(teacher / 1.7, -1)
    torch.testing.assert_close(top.log_probs, whole.sort(descending=True).values[:, :5])
    torch.testing.assert_close(whole.gather(1, top.indices), top.log_probs)
