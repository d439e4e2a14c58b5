"""Log-probs of tokens under a language model's head, without its (S, V) logits ever being all alive.

The vocabulary is gone through in slices: forward, a running logsumexp; backward, each slice's logits once more. So the
memory does not grow with the vocabulary, and each row of the head's gradient is written once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from products import product

SLICE = {"cpu": 2 ** 19, "cuda": 2 ** 28}  # logits that are alive at a time; 2 MB stay in a CPU core's cache


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: h W' + b, and where there is a cap, cap tanh(logits / cap)."""

    weight: Tensor  # (V, h)
    bias: Tensor | None = None  # (V,)
    cap: float | None = None
    dtype: torch.dtype | None = None  # that the products are computed in; None: the weight's

    def __call__(self, hidden: Tensor, part: slice = slice(None)) -> Tensor:
        """(n, h) to (n, V), or to the part of V, in float32 at least."""
        weight, dtype = self.weight[part], self.dtype or self.weight.dtype
        logits = product(hidden.to(dtype), weight.to(dtype))
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if self.bias is not None:
            logits = logits + self.bias[part]
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slices(self, rows: int) -> Iterator[slice]:
        """About equal parts of the vocabulary, of which `rows` hidden states have up to `SLICE` logits, or one id's."""
        V, most = len(self.weight), max(SLICE[self.weight.device.type] // max(rows, 1), 1)
        size = -(-V // -(-V // most))
        return (slice(start, min(start + size, V)) for start in range(0, V, size))


def token_logps(hidden: Tensor, head: Head, targets: Tensor, *, entropies: bool = False) -> Tensor:
    """Log-probability, in nats, of each target id under the head's distribution at its hidden state.

    hidden: (S, h), targets: (S,); returns (S,), in float32 at least. entropies: returns (2, S), the second row the
    distributions' entropies, through which no gradient flows.
    """
    logps, entropy = _TokenLogps.apply(hidden, head.weight, head.bias, targets, head, entropies)
    return torch.stack([logps, entropy]) if entropies else logps


class _TokenLogps(torch.autograd.Function):
    """log p(t) = l(t) - log Σ exp l, with dlog p / dl = [v = t] - p(v)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head,
                entropies: bool) -> tuple[Tensor, Tensor]:
        kept = torch.promote_types(head.dtype or weight.dtype, torch.float32)
        lse = torch.full(targets.shape, -torch.inf, dtype=kept, device=targets.device)
        mean, target = torch.zeros_like(lse), torch.zeros_like(lse)  # mean: of the logits so far
        for part in head.slices(len(hidden)):
            logits = head(hidden, part)
            longer = torch.logaddexp(lse, logits.logsumexp(1))
            if entropies:
                mean = mean * (lse - longer).exp() + ((logits - longer[:, None]).exp() * logits).sum(1)
            own = (targets - part.start).clamp(0, logits.shape[1] - 1)
            here = (targets >= part.start) & (targets < part.stop)
            target = torch.where(here, logits.gather(1, own[:, None])[:, 0], target)
            lse = longer
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.head, entropy = head, lse - mean
        ctx.mark_non_differentiable(entropy)
        return target - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head, gradient = ctx.head, -gradients[0][:, None]  # of p - [v = t]
        dtype = head.dtype or weight.dtype
        weighted = (gradient * hidden).to(dtype)  # here, not at the logits: those are many more
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if for_hidden else None
        d_weight = torch.empty_like(weight) if for_weight else None
        d_bias = torch.empty_like(bias) if for_bias else None
        for part in head.slices(len(hidden)):
            logits = head(hidden, part)
            slope = None if head.cap is None else 1 - (logits / head.cap) ** 2
            d_logits = logits.sub_(lse[:, None]).exp_()
            here = ((targets >= part.start) & (targets < part.stop)).nonzero()[:, 0]
            d_logits[here, targets[here] - part.start] -= 1
            if slope is not None:
                d_logits *= slope
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden += product(d_logits, weight[part].to(dtype).T)
            if d_weight is not None:
                d_weight[part] = product(d_logits.T, weighted.T)
            if d_bias is not None:
                d_bias[part] = gradient[:, 0] @ d_logits.to(gradient.dtype)
        return None if d_hidden is None else (gradient * d_hidden).to(hidden.dtype), d_weight, d_bias, None, None, None
