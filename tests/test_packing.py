"""Packed linear layers give what the usual ones do, and only where that is asked for."""

import pytest
import torch
from toys import toy_policy

import packing
from packing import packed_linears

Patch = pytest.MonkeyPatch


def packed_layers(lm: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in lm.modules())


@pytest.mark.parametrize("family", ["llama", "tied-llama", "gptneox"])
def test_a_packed_model_computes_the_same_up_to_rounding(family: str) -> None:
    """GPT-NeoX's layers have a bias. After the context the layers are the usual ones."""
    policy = toy_policy(family, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        usual = policy.lm(input_ids=ids).logits
        with packed_linears(policy):
            linear = sum(type(module) is torch.nn.Linear for module in policy.lm.modules())
            assert packed_layers(policy.lm) == linear > 5
            packed = policy.lm(input_ids=ids).logits
        assert packed_layers(policy.lm) == 0
        assert torch.equal(policy.lm(input_ids=ids).logits, usual)
    torch.testing.assert_close(packed, usual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    policy = toy_policy(dtype=dtype)
    with packed_linears(policy):
        assert packed_layers(policy.lm) == 0


def test_a_model_that_computes_in_another_dtype_is_not_packed() -> None:
    policy = toy_policy(dtype=torch.float32)
    policy.dtype = torch.bfloat16
    with packed_linears(policy):
        assert packed_layers(policy.lm) == 0


def test_a_model_that_leaves_no_memory_for_a_second_copy_is_not_packed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(packing, "SHARE", 0.0)
    policy = toy_policy(dtype=torch.float32)
    with packed_linears(policy):
        assert packed_layers(policy.lm) == 0


def test_layers_are_the_usual_ones_after_an_error() -> None:
    policy = toy_policy(dtype=torch.float32)
    with pytest.raises(KeyError), packed_linears(policy):
        raise KeyError
    assert packed_layers(policy.lm) == 0
