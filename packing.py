"""Linear layers laid out as oneDNN wants them: where weights do not change, few rows are not kept waiting for that."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from policy import Policy
from products import Linear, has_onednn

SHARE = 0.25  # of the machine's memory, that the second copy of the weights may take


@contextlib.contextmanager
def packed_linears(policy: Policy) -> Iterator[None]:
    """Context in which float32 linear layers on a CPU compute with packed copies of their weights, without a graph."""
    layers = [module for module in policy.lm.modules() if type(module) in (nn.Linear, Linear)] if _packs(policy) else []
    try:
        for layer in layers:
            _pack(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packs(policy: Policy) -> bool:
    parameters = list(policy.lm.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (has_onednn() and policy.device.type == "cpu" and policy.dtype == torch.float32
            and all(parameter.dtype == torch.float32 for parameter in parameters)
            and sum(parameter.nbytes for parameter in parameters) < SHARE * memory)


def _pack(layer: nn.Linear) -> None:
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), layer.bias
    compute = torch.ops.mkldnn._linear_pointwise.default

    def forward(input: Tensor) -> Tensor:
        return compute(input, weight, bias, "none", [], "")

    layer.forward = forward
