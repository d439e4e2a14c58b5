"""Log-probs under a head, against the plain log-softmax of all logits."""

import json

import pytest
import torch
import toys
from torch import Tensor

import head
from head import Head, token_logps

GOLDEN = toys.GOLDEN / "logps.json"


class WatchedHead(Head):
    """Keeps the number of logits of every call."""

    seen: list[int] = []  # noqa: RUF012  (a frozen dataclass takes no field of its own here)

    def __call__(self, hidden: Tensor, part: slice = slice(None)) -> Tensor:
        logits = super().__call__(hidden, part)
        self.seen.append(logits.numel())
        return logits


@pytest.mark.parametrize("logits_alive", [1, 20, 77, 10**6])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_token_logps_do_not_depend_on_the_slices(biased: bool, cap: float | None, logits_alive: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """7 states, 11 ids: values, entropies and all gradients are those of log_softmax, in float64.

    No more logits are alive than SLICE says, or one id's (7) where that is less; each is formed once in the forward
    and once in the backward pass: 77 and 77.
    """
    monkeypatch.setitem(head.SLICE, "cpu", logits_alive)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=draw, requires_grad=True)
                            for shape in ((7, 5), (11, 5), (11,)))
    inputs = [hidden, weight, *([bias] if biased else [])]
    targets, slopes = torch.randint(11, (7,), generator=draw), torch.randn(7, dtype=torch.float64, generator=draw)
    logits = hidden @ weight.T + (bias if biased else 0)
    full = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0]

    WatchedHead.seen.clear()
    found, entropies = token_logps(hidden, WatchedHead(weight, bias if biased else None, cap), targets, entropies=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, -(full.exp() * full).sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found @ slopes, inputs),
                               torch.autograd.grad(expected @ slopes, inputs), rtol=1e-12, atol=1e-12)
    assert max(WatchedHead.seen) <= max(logits_alive, 7)
    assert sum(WatchedHead.seen) == 2 * 77


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    token_logps(hidden, Head(weight), torch.tensor([0, 5, 2])).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_certain_token_has_log_probability_zero_and_never_more() -> None:
    """Logits of up to ±2e4 in float32: p(target) is 1, its log-prob 0, and what it sends back is 0."""
    hidden = torch.tensor([[1e2, 1e2]], requires_grad=True)
    weight = torch.tensor([[100.0, 100.0], [99.0, 100.0], [-100.0, -100.0]])
    logps = token_logps(hidden.expand(2, 2), Head(weight), torch.tensor([0, 1]))
    torch.testing.assert_close(logps, torch.tensor([0.0, -100.0]))
    gradient, = torch.autograd.grad(logps[0], hidden)
    assert gradient.abs().max() < 1e-30  # e^-100, of the second


def test_log_softmax_of_bfloat16_logits_is_in_float32() -> None:
    """Logits (0, 8): log p of the second is -log(1 + e^-8) = -3.354e-4; 8 - logsumexp in bfloat16 would be 0."""
    weight = torch.eye(2, dtype=torch.bfloat16)
    logps = token_logps(torch.tensor([[0.0, 8.0]], dtype=torch.bfloat16), Head(weight), torch.tensor([1]))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, torch.tensor([-3.35406e-4]), rtol=1e-3, atol=0)


def test_products_in_bfloat16_leave_the_gradients_in_float32() -> None:
    """Masters in float32, products in bfloat16: gradients come in float32, within bfloat16's rounding of the exact."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=draw, requires_grad=True) for shape in ((40, 16), (50, 16)))
    targets = torch.randint(50, (40,), generator=draw)
    exact = torch.autograd.grad(token_logps(hidden, Head(weight), targets).mean(), (hidden, weight))
    rough = torch.autograd.grad(token_logps(hidden, Head(weight, dtype=torch.bfloat16), targets).mean(),
                                (hidden, weight))
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.02 * one.norm()


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden numbers here")
def test_token_logps_match_the_golden_numbers() -> None:
    """Labels of -100 are not scored, nor is the first position; gradients are those of the sum."""
    cases = [case for case in json.loads(GOLDEN.read_text())["cases"] if case["dtype"] == "float32"]
    assert len(cases) >= 5
    for case in cases:
        logits = torch.tensor(case["logits"], requires_grad=True)
        labels = torch.tensor(case["labels"])[:, 1:]
        scored = labels != -100
        expected = torch.tensor(case["out"]["token"])
        logps = token_logps(logits[:, :-1][scored], Head(torch.eye(logits.shape[-1])), labels[scored])
        torch.testing.assert_close(logps, expected[scored], rtol=1e-5, atol=1e-6)
        gradient, = torch.autograd.grad(logps.sum(), logits)
        torch.testing.assert_close(gradient, torch.tensor(case["out"]["token_grad_of_sum"]), rtol=1e-5, atol=1e-6)
