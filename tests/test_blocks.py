"""Blocks that recompute their activations, or are compiled, give the same numbers; and each does what it is for."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import FAMILIES, toy_config, toy_policy

import models
from blocks import COSTLY, compile_blocks, find_blocks, recompute_activations
from policy import Policy, trial
from utils import UserError

Patch = pytest.MonkeyPatch


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operation).removesuffix(".default")] += 1
        return operation(*args, **(kwargs or {}))


def prepared(how: bool | str, family: str = "llama", dtype: torch.dtype = torch.float64) -> Policy:
    policy = toy_policy(family, dtype=dtype)
    if how:
        recompute_activations(find_blocks(policy.lm), how)
        policy.lm.train()
    return policy


# Which they are ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_the_layers(family: str) -> None:
    lm = toy_policy(family).lm
    blocks = find_blocks(lm)
    assert len(blocks) == lm.config.num_hidden_layers
    assert find_blocks(lm, type(blocks[0]).__name__) == blocks


def test_a_class_of_blocks_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model.block_name: LlamaForCausalLM has no module of class "
                                        r"'LlamaDecoderLayr'; did you mean 'LlamaDecoderLayer'\?"):
        find_blocks(toy_policy().lm, "LlamaDecoderLayr")
    with pytest.raises(UserError, match="model.block_name: Linear has no list of blocks"):
        find_blocks(nn.Linear(1, 1))


# Recomputed ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_recomputing_changes_no_bit(how: bool | str, family: str) -> None:
    assert torch.equal(trial(prepared(how, family)), trial(prepared(False, family)))


def test_selective_recomputing_repeats_neither_products_nor_attention() -> None:
    """A block has 7 products forward, for q, k, v, o, gate, up and down, and 7 backward for what goes into them.

    `trial` has two microbatches, and 2 blocks; recomputing all repeats 6 of the 7, and attention, in each: nobody asks
    for what down gives.
    """
    def counted(how: bool | str) -> tuple[int, int]:
        policy = prepared(how)
        with Operations() as seen:
            trial(policy)
        attended = sum(count for name, count in seen.counts.items() if name in COSTLY and "attention" in name)
        return sum(seen.counts[name] for name in ("aten.mm", "aten.addmm", "mkldnn._linear_pointwise")), attended

    none, every, some = counted(False), counted(True), counted("selective")
    assert none[1] == 4 and every == (none[0] + 4 * 6, 8)
    assert some == none


def test_nothing_is_recomputed_in_evaluation(monkeypatch: Patch) -> None:
    policy = prepared(True)
    monkeypatch.setattr("blocks.recompute", pytest.fail)
    policy.eval()
    trial(policy)
    policy.train()
    with torch.no_grad():
        [block, *_] = find_blocks(policy.lm)
        h = torch.zeros(1, 2, policy.lm.config.hidden_size, dtype=torch.float64)
        block(h, position_embeddings=policy.lm.model.rotary_emb(h, torch.arange(2)[None]))


def test_a_copy_recomputes_with_weights_of_its_own() -> None:
    """The reference is a copy of the policy: its blocks may not go on with the policy's weights."""
    policy = prepared(True)
    expected, copied = trial(policy), copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(trial(copied), expected) and not torch.equal(trial(policy), expected)


@pytest.mark.parametrize("how", [False, True, "selective"])
def test_a_policy_is_loaded_with_what_the_settings_say(how: bool | str) -> None:
    config = toy_config(model__activation_checkpointing=how)
    policy = models.load_policy(config)
    assert {vars(block).get("recomputed", False) for block in find_blocks(policy.lm)} == {how}
    assert policy.lm.training or not how


# Compiled ------------------------------------------------------------------------------------------------------------

# Which the compiler itself causes, when it looks at what is not a leaf.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Compiler:
    """Stands for a compiler: counts what it is given, and leaves it as it is."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.graphs, compiled = 0, torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **named: compiled(model, backend=self, **named))

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@quiet
@pytest.mark.parametrize("how", [False, True])
def test_compiled_blocks_give_the_same_and_share_a_compilation(how: bool, monkeypatch: Patch) -> None:
    """Two blocks, rows with a mask and without: two graphs, and not one for each block or length."""
    policy, expected = prepared(how), trial(prepared(how))
    compiler = Compiler(monkeypatch)
    assert compile_blocks(find_blocks(policy.lm), lambda: trial(policy))
    found = trial(policy)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert 1 <= compiler.graphs <= 4


@pytest.mark.parametrize("mode, compiled", [("train", True), ("sample", False), ("eval", False)])
def test_blocks_are_compiled_for_training_alone(mode: str, compiled: bool, monkeypatch: Patch) -> None:
    """A row that is written grows with every token, and would be compiled anew."""
    calls = list[int]()
    monkeypatch.setattr(models, "compile_blocks", lambda blocks, trial: calls.append(len(blocks)))
    models.load_policy(toy_config(model__compile=True, mode=mode))
    assert calls == ([2] if compiled else [])


def test_a_compiler_that_fails_is_done_without(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    policy = prepared(False)
    expected = trial(policy)

    def failing(model: Any, **named: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            raise RuntimeError("no compiler found\nhere")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    assert not compile_blocks(find_blocks(policy.lm), lambda: trial(policy))
    assert "note: model.compile: RuntimeError: no compiler found; going on without" in capsys.readouterr().err
    assert torch.equal(trial(policy), expected)


@quiet
def test_a_reference_of_a_compiled_policy_is_a_copy(monkeypatch: Patch) -> None:
    Compiler(monkeypatch)
    policy = prepared(False)
    assert compile_blocks(find_blocks(policy.lm), lambda: trial(policy))
    expected, copied = trial(policy), copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    torch.testing.assert_close(trial(copied), expected, rtol=0, atol=1e-11)
    assert policy.state_dict().keys() == prepared(False).state_dict().keys()
