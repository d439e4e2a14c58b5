"""oneDNN's products, against PyTorch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

import products
from products import Linear, product, use_onednn

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="no oneDNN here")


def results(layer: nn.Module, input: Tensor) -> list[Tensor]:
    """What the layer gives, and the gradients of its squares."""
    output = layer(input)
    wanted = [tensor for tensor in (input, *layer.parameters()) if tensor.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_what_it_gave_before(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(5, 7, bias=bias)
    input = torch.randn(shape, requires_grad=True)
    before = results(layer, input)
    use_onednn(layer)
    assert type(layer) is Linear
    torch.testing.assert_close(results(layer, input), before)


def test_a_frozen_layer_and_an_input_without_gradient_are_taken() -> None:
    layer, input = nn.Linear(5, 7), torch.randn(3, 5)
    expected = results(layer, input)
    use_onednn(layer)
    torch.testing.assert_close(results(layer, input), expected)
    layer.requires_grad_(False)
    assert not layer(input).requires_grad
    input.requires_grad_()
    torch.testing.assert_close(results(layer, input)[1:], [2 * expected[0].detach() @ layer.weight])


def test_inputs_and_gradients_need_not_be_contiguous() -> None:
    layer = nn.Linear(6, 4)
    input = torch.randn(6, 5).T.requires_grad_()
    before = results(layer, input)
    use_onednn(layer)
    torch.testing.assert_close(results(layer, input), before)
    gradient, = torch.autograd.grad(layer(input).sum(), layer.weight)  # of ones, expanded
    torch.testing.assert_close(gradient, input.detach().sum(0).expand(4, 6))


def test_a_copy_computes_with_its_own_weights() -> None:
    """As a reference does, which is a copy of the policy."""
    layer = nn.Linear(3, 2)
    use_onednn(layer)
    other, input = copy.deepcopy(layer), torch.randn(4, 3)
    with torch.no_grad():
        layer.weight.add_(1)
    torch.testing.assert_close(layer(input) - other(input), input.sum(1, keepdim=True).expand(4, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    layer, input = nn.Linear(5, 7, dtype=dtype), torch.randn(3, 5, dtype=dtype, requires_grad=True)
    before = results(layer, input)
    use_onednn(layer)
    for found, expected in zip(results(layer, input), before, strict=True):
        assert torch.equal(found, expected)


def test_autocast_is_left_to_pytorch() -> None:
    layer, input = nn.Linear(5, 7), torch.randn(3, 5)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16


def test_a_product_is_that_of_rows_and_columns() -> None:
    """(1 2) and (3 4), times columns (5 6), (7 8), (9 10): 5 + 12 = 17, 7 + 16 = 23, 29; 39, 53, 67."""
    rows, columns = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 8], [9, 10]])
    expected = torch.tensor([[17.0, 23, 29], [39, 53, 67]])
    assert torch.equal(product(rows, columns), expected)
    assert torch.equal(product(rows.T.contiguous().T, columns.T.contiguous().T), expected)
    assert torch.equal(product(rows.double(), columns.double()), expected.double())
