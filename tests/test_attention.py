"""Attention by blocks of the mask gives what the mask as a matrix gives, forward and backward; or it is not used."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_groups, toy_policy
from transformers import Gemma2Config

import attention
import policy as policy_module
from attention import NAME, block_mask, use_flex_attention
from policy import Policy, takes_flex_attention, trial
from sequences import cut_into_microbatches

pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}:UserWarning") for what in (
    "flex_attention called without torch.compile", "The .grad attribute of a Tensor that is not a leaf")]
Patch = pytest.MonkeyPatch
ROLES = ["chosen", "rejected"]


@pytest.fixture(autouse=True)
def backward_on_a_cpu(monkeypatch: Patch) -> None:
    """PyTorch has it, uncompiled, and refuses it for want of a fast one."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def flexible(policy: Policy) -> Policy:
    """A copy that takes masks as blocks."""
    found = copy.deepcopy(policy)
    assert use_flex_attention(found.lm)
    found.flex = True
    return found


def test_a_mask_by_hand() -> None:
    """A prompt of 2 ids, a completion of 2, one of 1, and padding: what each of the 6 sees, of the 6."""
    mask = block_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    expected = ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", "xx...x"]
    places = torch.arange(6)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None, :])
    assert ["".join(".x"[int(one)] for one in row) for row in seen] == expected


@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_log_probs_and_gradients_are_those_of_the_mask_as_a_matrix(family: str) -> None:
    """Rows of several lengths, with and without completions that share one; in float64."""
    dense = toy_policy(family)
    blocks, groups = flexible(dense), [*toy_groups(5), *toy_groups(3, "chosen", seed=1)]
    rows = cut_into_microbatches(groups, ROLES, 60)
    assert {each.segments is None for each in rows} == {True, False}
    for each in rows:
        for policy in (dense, blocks):
            policy.zero_grad()
        found, expected = (policy(each)["token_logps"] for policy in (blocks, dense))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        found.square().sum().backward()
        expected.square().sum().backward()
        for ours, theirs in zip(blocks.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_it_computes_in_the_dtype_of_autocast() -> None:
    """In bfloat16 with weights of float32, where the rotated queries are float32 and the values are not."""
    dense = toy_policy(dtype=torch.float32)
    dense.dtype = torch.bfloat16
    torch.testing.assert_close(trial(flexible(dense)), trial(dense), rtol=0.1, atol=0.2)


def test_a_policy_takes_it_where_it_works(monkeypatch: Patch) -> None:
    policy, calls = toy_policy(), []
    by_blocks = attention.flex("cpu")
    monkeypatch.setattr(attention, "flex", lambda kind: lambda *args, **named: calls.append(1) or by_blocks(
        *args, **named))
    expected = trial(policy)
    assert takes_flex_attention(policy)
    assert len(calls) == policy.lm.config.num_hidden_layers and policy.lm.config._attn_implementation == NAME
    torch.testing.assert_close(trial(policy), expected, rtol=0, atol=1e-11)  # it is for the caller to switch it on


@pytest.mark.parametrize("broken", ["raises", "is wrong"])
def test_a_policy_does_without_where_it_does_not_work(broken: str, monkeypatch: Patch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    policy = toy_policy()
    by_blocks, expected = attention.flex("cpu"), trial(policy)

    def flex(*args: Any, **named: Any) -> Tensor:
        if broken == "raises":
            raise RuntimeError("no kernel\nfor this")
        return by_blocks(*args, **{**named, "scale": 3.0})

    monkeypatch.setattr(attention, "flex", lambda kind: flex)
    assert not takes_flex_attention(policy)
    said = "RuntimeError: no kernel)" if broken == "raises" else "ValueError: log-probs or gradients are off by up to"
    assert said in capsys.readouterr().err
    assert policy.lm.config._attn_implementation == "sdpa" and torch.equal(trial(policy), expected)


def test_models_that_attend_in_a_way_of_their_own_are_left_alone(monkeypatch: Patch) -> None:
    eager, capped = toy_policy(), toy_policy()
    eager.lm.set_attn_implementation("eager")
    capped.lm.config.attn_logit_softcapping = Gemma2Config().attn_logit_softcapping
    monkeypatch.setattr(policy_module, "note_failure", pytest.fail)
    for policy, kept in ((eager, "eager"), (capped, "sdpa")):
        assert not takes_flex_attention(policy) and policy.lm.config._attn_implementation == kept


def test_what_is_exported_does_not_name_it(tmp_path: Path) -> None:
    policy = flexible(toy_policy())
    policy.lm.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
