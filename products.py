"""Matrix products of float32 on an x86 CPU by oneDNN, which PyTorch has on board but uses for other dtypes only.

Its usual library, MKL, keeps AVX-512 for Intel's processors: on another oneDNN computes the same in half the time.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def fits(*tensors: Tensor) -> bool:
    """Whether these are for oneDNN: plain float32 on a CPU, and not empty."""
    return has_onednn() and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0
                                for tensor in tensors)


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, k) times the transpose of (m, k): (n, m). No gradient flows through it on a CPU."""
    if fits(rows, columns):
        return torch.ops.mkldnn._linear_pointwise.default(rows, columns, None, "none", [], "")
    return rows @ columns.T


class Linear(nn.Linear):
    """An `nn.Linear` whose products, forward and backward, are oneDNN's where they can be."""

    def forward(self, input: Tensor) -> Tensor:
        if fits(input, self.weight) and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(input, self.weight, self.bias)
        return super().forward(input)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        for_input, for_weight, for_bias = ctx.needs_input_grad
        flat, rows = gradients[0].reshape(-1, len(weight)), input.reshape(-1, weight.shape[1])
        return (product(flat, weight.T).view(input.shape) if for_input else None,
                product(flat.T, rows.T) if for_weight else None,
                flat.sum(0) if for_bias else None)


def use_onednn(model: nn.Module) -> None:
    """Let the model's linear layers compute by it; they stay `nn.Linear`s to all who ask."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
