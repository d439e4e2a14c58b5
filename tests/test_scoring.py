"""Law 1: however a batch is cut up, its loss, gradient and metrics are those of the naive path."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Item, Naive, exact, naive
from oracle import token_logps as naive_token_logps
from torch import Tensor
from toys import FAMILIES, toy_config, toy_groups, toy_policy

from arguments import Losses
from blocks import find_blocks, recompute_activations
from groups import Group, with_mismatched
from policy import Policy
from scoring import LossTrainer
from sequences import Rows
from trainers import (
    BradleyTerryTrainer,
    DPOTrainer,
    KTOTrainer,
    PairedPreferenceTrainer,
    SFTTrainer,
    SimpleKTOTrainer,
    UnpairedPreferenceTrainer,
)
from utils import UserError

BUDGETS = {"whole": 10**6, "some": 48, "single": 1}
SEED = 59  # of the batch of law 1: see the test that says why it is a hard one


TRAINERS: dict[str, type[LossTrainer]] = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer,
                                          "kto-simple": SimpleKTOTrainer, "bradley-terry": BradleyTerryTrainer}


def make_trainer(loss: str | type[LossTrainer], family: str = "llama", *, dtype: torch.dtype = torch.float64,
                 budget: str = "whole", share: bool = True, checkpointing: bool = False,
                 **overrides: Any) -> LossTrainer:
    """A trainer on a toy policy and another toy as its reference; a class gets the settings of a KTO."""
    trainer_class = TRAINERS[loss] if isinstance(loss, str) else loss
    config = toy_config(loss if isinstance(loss, str) else "kto", **overrides)
    policy = toy_policy(family, 0, dtype, reward_head=config.loss.reward_head).to(dtype)
    if policy.reward_head is not None:  # at its start, 0, no gradient reaches the body
        weight = policy.reward_head.weight.data
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    reference = toy_policy(family, 1, dtype).requires_grad_(False) if config.loss.use_reference_model else None
    if dtype == torch.float64:
        policy, reference = exact(policy), reference and exact(reference)
    if checkpointing:
        recompute_activations(find_blocks(policy.lm), True)
        policy.lm.train()
    nothing: Any = None
    return trainer_class(config, policy, reference, nothing, nothing, nothing, Path("unused"), budget=BUDGETS[budget],
                         share=share)


def make_batch(loss: str, n: int = 7, seed: int = SEED, roles: str = "") -> list[Group]:
    """n groups with what the loss needs; two neighbours have the same prompt's key, so that pairs may be complete."""
    roles = roles or {"sft": "chosen", "kto": "unpaired", "kto-simple": "unpaired"}.get(loss, "chosen rejected")
    groups = toy_groups(n, roles, seed, longest=12)
    if loss in ("kto", "kto-simple"):
        groups = [replace(group, key=group.key // 2) for group in groups]
    return with_mismatched(groups, 64) if loss == "kto" else groups


@cache
def expected_of(loss: str, family: str = "llama") -> Naive:
    return naive_of(make_trainer(loss, family), loss, make_batch(loss))


def naive_of(trainer: LossTrainer, loss: str, batch: list[Group]) -> Naive:
    assert trainer.reference is None or isinstance(trainer.reference, Policy)
    return naive(loss, trainer.policy, trainer.reference, batch, trainer.config.loss)


def assert_same_gradient(policy: Policy, expected: Mapping[str, Tensor]) -> None:
    """Of every parameter. Some are 0 but for rounding (a key's bias), so the whole gradient sets the least scale."""
    whole = norm(expected.values())
    assert whole > 1e-3
    for name, gradient in gradients(policy).items():
        assert norm([gradient - expected[name]]) <= 1e-8 * norm([expected[name]]) + 1e-13 * whole, name


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in policy.named_parameters()}


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


# Law 1 ----------------------------------------------------------------------------------------------------------------

CUTS = [
    *((loss, "llama", budget, share, False) for loss in TRAINERS for budget in BUDGETS for share in (True, False)),
    *((loss, "llama", budget, budget == "some", True) for loss in TRAINERS for budget in ("some", "single")),
    *((loss, family, "some", share, share) for loss in TRAINERS for family in FAMILIES if family != "llama"
      for share in (True, False)),
    *((loss, "mistral", budget, True, False) for loss in ("dpo", "kto") for budget in ("whole", "single")),
]


@pytest.mark.parametrize(("loss", "family", "budget", "share", "checkpointing"), CUTS)
def test_cutting_changes_nothing(loss: str, family: str, budget: str, share: bool, checkpointing: bool) -> None:
    expected, batch = expected_of(loss, family), make_batch(loss)
    trainer = make_trainer(loss, family, budget=budget, share=share, checkpointing=checkpointing)

    metrics = trainer.accumulate(batch, len(batch)).means()
    assert metrics == pytest.approx(expected.metrics, rel=1e-8, abs=1e-12)
    assert_same_gradient(trainer.policy, expected.gradients)

    value, evaluation = trainer.get_batch_metrics(batch, "eval")
    assert value.item() == pytest.approx(expected.losses.mean().item(), rel=1e-8)
    assert evaluation.means() == pytest.approx({
        name.replace("_train/", "_eval/").replace("/train", "/eval"): number
        for name, number in expected.metrics.items()}, rel=1e-8, abs=1e-12)


def test_the_batch_of_law_1_is_a_hard_one() -> None:
    """Several microbatches, spans on both sides of mistral's window of 16, complete pairs, z clamped and not, and
    the clamps of kto-simple open on both sides."""
    trainer = make_trainer("kto", budget="some")
    calls = watch(trainer.policy)
    trainer.accumulate(make_batch("kto"), 7)
    assert sum(call.with_graph for call in calls) >= 3
    for loss in ("dpo", "kto"):
        spans = [len(group.prompt) + max(map(len, group.completions.values())) for group in make_batch(loss)]
        assert min(spans) <= 16 < max(spans)
    for family in FAMILIES:
        assert {"rewards_train/accuracies", "rewards_train/margins"} <= expected_of("kto", family).metrics.keys()
        simple = expected_of("kto-simple", family).metrics
        assert min(simple["rewards_train/chosen"], simple["rewards_train/rejected"]) > 0
    assert {expected_of("kto", family).metrics["rewards_train/KL_clamped"] for family in FAMILIES} == {0, 1}


@pytest.mark.parametrize("loss", TRAINERS)
@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_float32_is_within_1e_4_of_float64(loss: str, family: str) -> None:
    """The path that users run, activation checkpointing included: the whole gradient, and the loss."""
    expected, batch = expected_of(loss, family), make_batch(loss)
    trainer = make_trainer(loss, family, dtype=torch.float32, budget="some", checkpointing=True)
    metrics = trainer.accumulate(batch, len(batch)).means()
    assert metrics["loss/train"] == pytest.approx(expected.metrics["loss/train"], rel=1e-5)
    difference = norm(gradient - expected.gradients[name] for name, gradient in gradients(trainer.policy).items())
    assert difference <= 1e-4 * norm(expected.gradients.values())


@pytest.mark.parametrize(("loss", "n", "roles"), [
    ("sft", 1, ""), ("sft", 3, ""), ("dpo", 1, ""), ("dpo", 5, ""), ("bradley-terry", 3, ""),
    ("kto", 2, ""), ("kto", 2, "chosen"), ("kto", 2, "rejected"), ("kto", 3, ""), ("kto", 5, "chosen"),
    ("kto", 5, "rejected"), ("kto-simple", 1, "chosen"), ("kto-simple", 3, "chosen"), ("kto-simple", 3, "rejected")])
@pytest.mark.parametrize("budget", ["single", "some"])
def test_odd_batches_and_batches_of_one_class_are_no_special_case(loss: str, n: int, roles: str, budget: str) -> None:
    trainer, batch = make_trainer(loss, budget=budget), make_batch(loss, n, roles=roles)
    expected = naive_of(make_trainer(loss), loss, batch)
    assert trainer.accumulate(batch, n).means() == pytest.approx(expected.metrics, rel=1e-8, abs=1e-12)
    assert_same_gradient(trainer.policy, expected.gradients)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_frozen_body_gives_the_head_its_gradient_and_gets_none(budget: str) -> None:
    """Twice over: the second time from what it remembers, which a batch in another order must find again."""
    trainer, batch = make_trainer("bradley-terry", budget=budget), make_batch("bradley-terry")
    trainer.policy.train_body = False
    trainer.policy.lm.requires_grad_(False)
    for again in (batch, batch[::-1]):
        trainer.policy.zero_grad()
        trainer.accumulate(again, len(batch))
        assert all(parameter.grad is None for parameter in trainer.policy.lm.parameters())
        weight = "reward_head.weight"
        assert_same_gradient(trainer.policy, {name: gradient * (name == weight) for name, gradient in expected_of(
            "bradley-terry").gradients.items()})


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto"])
def test_a_window_of_unequal_batches_gives_the_gradient_of_the_mean_over_its_examples(loss: str) -> None:
    """Batches of 4, 3 and 2: their mean gradients weighted by 4/9, 3/9 and 2/9 (z of a KTO is a batch's own)."""
    trainer, other = make_trainer(loss, budget="some"), make_trainer(loss)
    window = [make_batch(loss, n, seed) for seed, n in enumerate((4, 3, 2))]
    for batch in window:
        trainer.accumulate(batch, 9)
    parts = [naive_of(other, loss, batch).gradients for batch in window]
    weights = torch.tensor([4 / 9, 3 / 9, 2 / 9], dtype=torch.float64)
    assert_same_gradient(trainer.policy, {name: torch.tensordot(weights, torch.stack([part[name] for part in parts]), 1)
                                          for name in parts[0]})
    if loss != "kto":
        together = naive_of(other, loss, [group for batch in window for group in batch])
        assert_same_gradient(trainer.policy, together.gradients)


# What is computed -----------------------------------------------------------------------------------------------------

@dataclass
class Call:
    """One forward pass of a policy."""

    items: list[Item]
    rows: int
    with_graph: bool
    wanted: tuple[str, ...]


def watch(policy: object) -> list[Call]:
    """The passes that the policy makes from now on."""
    assert isinstance(policy, Policy)
    calls, forward = list[Call](), policy.forward

    def watched(rows: Rows, wanted: Any = ("token_logps",)) -> dict[str, Tensor]:
        calls.append(Call(rows.items, len(rows.input_ids), torch.is_grad_enabled(), tuple(wanted)))
        return forward(rows, wanted)

    policy.forward = watched
    return calls


@pytest.mark.parametrize(("loss", "budget", "trained", "without_graph", "reference"), [
    ("sft", "some", "chosen", "", ""),
    ("dpo", "some", "chosen rejected", "", "chosen rejected"),
    ("kto", "some", "chosen rejected", "KL", "chosen rejected KL"),
    ("kto-simple", "whole", "chosen rejected", "", "chosen rejected"),
    ("kto-simple", "some", "chosen rejected", "chosen rejected", "chosen rejected"),
    ("bradley-terry", "some", "chosen rejected", "", "")])
def test_what_a_loss_does_not_ask_for_is_not_computed(loss: str, budget: str, trained: str, without_graph: str,
                                                      reference: str) -> None:
    """Every completion of these roles goes once through the model, and no other one; all have more roles to offer.

    Only a coupled loss scores what it trains on beforehand, and only where the batch is cut.
    """
    trainer = make_trainer(loss, budget=budget, loss__use_reference_model=True)
    calls, reference_calls = watch(trainer.policy), watch(trainer.reference)
    paired = loss in ("sft", "dpo", "bradley-terry")
    batch = toy_groups(6, "chosen rejected KL", longest=12) if paired else make_batch("kto", 6)
    trainer.accumulate(batch, len(batch))

    def completions(roles: str) -> Counter[Item]:
        return Counter((i, role) for i, group in enumerate(batch) for role in {*roles.split()} & {*group.completions})

    def scored(calls: list[Call], with_graph: bool) -> Counter[Item]:
        return Counter(item for call in calls if call.with_graph == with_graph for item in call.items)

    assert scored(calls, True) == completions(trained)
    assert scored(calls, False) == completions(without_graph)
    assert scored(reference_calls, False) == completions(reference)
    assert not scored(reference_calls, True)
    assert {call.wanted for call in calls} == {("scores",) if loss == "bradley-terry" else ("token_logps",)}


def test_only_the_reference_scores_an_example_and_its_mismatched_completion_in_one_row() -> None:
    """6 examples: the reference reads 6 rows; the policy 6 with a graph, and 6 with none."""
    trainer, batch = make_trainer("kto"), make_batch("kto", 6)
    calls, reference_calls = watch(trainer.policy), watch(trainer.reference)
    trainer.accumulate(batch, len(batch))
    assert [(call.rows, call.with_graph) for call in calls] == [(6, False), (6, True)]
    assert [(call.rows, len(call.items)) for call in reference_calls] == [(6, 12)]


def test_scores_alone_need_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(self: Policy) -> None:
        raise AssertionError("the output head ran")

    monkeypatch.setattr(Policy, "head", property(head))
    trainer, batch = make_trainer("bradley-terry"), make_batch("bradley-terry", 3)
    trainer.accumulate(batch, 3)
    with pytest.raises(AssertionError, match="the output head ran"):
        make_trainer("sft").accumulate(batch, 3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_gradient_flows_through_mismatched_pairs(budget: str) -> None:
    """Even where a loss forgets to detach z, its gradient is that of the naive path, in which z is a number."""

    class Forgetful(KTOTrainer):
        def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, policy_KL_logps: Tensor,
                 reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
                 reference_KL_logps: Tensor) -> Losses:
            beta = self.config.loss.beta
            z = (policy_KL_logps - reference_KL_logps).mean().clamp(min=0)
            chosen = policy_chosen_logps - reference_chosen_logps
            rejected = policy_rejected_logps - reference_rejected_logps
            return (torch.cat([torch.sigmoid(beta * (z - chosen)), torch.sigmoid(beta * (rejected - z))]),
                    beta * chosen, beta * rejected)

    trainer, batch, expected = make_trainer(Forgetful, budget=budget), make_batch("kto"), expected_of("kto")
    assert expected.metrics["rewards_train/KL_estimate"] > 0
    assert trainer.accumulate(batch, len(batch)).means() == pytest.approx(expected.metrics, rel=1e-8, abs=1e-12)
    assert_same_gradient(trainer.policy, expected.gradients)


# What a loss is given -------------------------------------------------------------------------------------------------

class TokenTrainer(PairedPreferenceTrainer):
    """Mean token log-probs; keeps what it is given."""

    def loss(self, policy_chosen_token_logps: Tensor, policy_rejected_token_logps: Tensor, chosen_lengths: Tensor,
             rejected_lengths: Tensor, reference_chosen_token_logps: Tensor, KL_lengths: Tensor) -> Losses:
        self.given = {"chosen": policy_chosen_token_logps, "rejected": policy_rejected_token_logps,
                      "reference": reference_chosen_token_logps}
        self.lengths = {"chosen": chosen_lengths, "rejected": rejected_lengths, "KL": KL_lengths}
        return (policy_rejected_token_logps.sum(1) / rejected_lengths
                - policy_chosen_token_logps.sum(1) / chosen_lengths), None, None


def test_token_logps_are_padded_with_zeros_and_lengths_count_scored_ids() -> None:
    trainer, batch = make_trainer(TokenTrainer, budget="some"), toy_groups(5, "chosen rejected KL")
    assert isinstance(trainer, TokenTrainer) and isinstance(trainer.reference, Policy)
    trainer.get_batch_metrics(batch, "eval")

    with torch.no_grad():
        expected = {role: naive_token_logps(trainer.policy.lm, batch, [role]) for role in ("chosen", "rejected")}
        expected["reference"] = naive_token_logps(trainer.reference.lm, batch, ["chosen"])
    for what, by_item in expected.items():
        given = trainer.given[what]
        assert given.shape == (5, max(map(len, by_item.values())))
        for row, logps in zip(given, by_item.values(), strict=True):
            torch.testing.assert_close(row[:len(logps)], logps, rtol=1e-8, atol=1e-10)
            assert row[len(logps):].eq(0).all()
    for role, lengths in trainer.lengths.items():
        assert lengths.tolist() == [len(group.completions[role]) for group in batch]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_loss_of_token_logps_has_the_gradient_of_the_naive_path(budget: str) -> None:
    trainer, batch = make_trainer(TokenTrainer, budget=budget), toy_groups(5, "chosen rejected KL")
    lm = make_trainer("sft").policy
    means = {item: logps.mean() for item, logps in naive_token_logps(lm.lm, batch, ["chosen", "rejected"]).items()}
    loss = sum(means[i, "rejected"] - means[i, "chosen"] for i in range(5)) / 5
    assert isinstance(loss, Tensor)
    loss.backward()
    metrics = trainer.accumulate(batch, 5).means()
    assert metrics["loss/train"] == pytest.approx(loss.item(), rel=1e-8)
    assert_same_gradient(trainer.policy, gradients(lm))


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_token_logps_of_an_absent_class_are_an_empty_table(role: str) -> None:
    """In a batch of one class the other's are (0, 0): what sums over tokens gives (0,), as logps do."""

    class Tokens(UnpairedPreferenceTrainer):
        def loss(self, policy_chosen_token_logps: Tensor, policy_rejected_token_logps: Tensor) -> Losses:
            return torch.cat([-policy_chosen_token_logps.sum(1), policy_rejected_token_logps.sum(1)]), None, None

    trainer, batch = make_trainer(Tokens, budget="some"), toy_groups(5, role)
    metrics = trainer.accumulate(batch, 5).means()
    sign = {"chosen": -1, "rejected": 1}[role]
    with torch.no_grad():
        sums = [logps.sum().item() for logps in naive_token_logps(trainer.policy.lm, batch, [role]).values()]
    assert metrics["loss/train"] == pytest.approx(sign * sum(sums) / 5, rel=1e-8)


# The probe ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("loss", "couples"), [("sft", False), ("dpo", False), ("kto", False), ("bradley-terry", False),
                                               ("kto-simple", True)])
def test_the_probe_finds_out_whether_a_loss_couples_examples(loss: str, couples: bool) -> None:
    assert make_trainer(loss).couples_examples == couples


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(("least", "most"), [(0, None), (None, 0), (5, None), (None, -5), (0.01, 0.1)])
def test_the_probe_sees_a_coupling_behind_a_clamp(side: str, least: float | None, most: float | None) -> None:
    class Clamped(UnpairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
                 reference_rejected_logps: Tensor) -> Losses:
            ratios = {"chosen": policy_chosen_logps - reference_chosen_logps,
                      "rejected": policy_rejected_logps - reference_rejected_logps}
            z = ratios[side].mean().clamp(least, most) if len(ratios[side]) else 0
            return torch.cat([z - ratios["chosen"], ratios["rejected"] - z]), None, None

    assert make_trainer(Clamped).couples_examples


def test_the_probe_sees_that_pairs_are_compared_with_other_pairs() -> None:
    class Flipped(PairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
            return policy_rejected_logps.flip(0) - policy_chosen_logps, None, None

    assert make_trainer(Flipped).couples_examples


class DetachedBaseline(PairedPreferenceTrainer):
    """The batch's mean log-prob as a baseline that is a constant, and a square that makes the gradient depend on it."""

    def loss(self, policy_chosen_logps: Tensor) -> Losses:
        return (policy_chosen_logps - policy_chosen_logps.mean().detach()) ** 2, None, None


class ReferenceBaseline(PairedPreferenceTrainer):
    """A constant baseline from the reference's log-probs."""

    def loss(self, policy_chosen_logps: Tensor, reference_chosen_logps: Tensor) -> Losses:
        return (policy_chosen_logps - reference_chosen_logps.mean()) ** 2, None, None


class LengthWeighted(PairedPreferenceTrainer):
    """Examples weigh as much as their share of the batch's tokens."""

    def loss(self, policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Losses:
        return -policy_chosen_logps * chosen_lengths / chosen_lengths.mean(), None, None


@pytest.mark.parametrize("trainer_class", [DetachedBaseline, ReferenceBaseline, LengthWeighted])
def test_a_loss_that_sees_other_examples_as_constants_is_cut_without_a_change(trainer_class: type[LossTrainer]) -> None:
    """No entry of the Jacobian tells that a baseline over the batch couples examples; gradients must be right too."""
    whole, cut = make_trainer(trainer_class), make_trainer(trainer_class, budget="single")
    batch = toy_groups(5, "chosen")
    assert cut.accumulate(batch, 5).means() == pytest.approx(whole.accumulate(batch, 5).means(), rel=1e-8)
    assert_same_gradient(cut.policy, gradients(whole.policy))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_loss_may_want_a_side_from_the_reference_alone(budget: str) -> None:
    """Paired, and rejected is not trained on: log-ratios against what the reference gives rejected, per token of it."""

    class OneSided(PairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor, reference_rejected_logps: Tensor,
                 rejected_lengths: Tensor) -> Losses:
            return (reference_rejected_logps - policy_chosen_logps) / rejected_lengths, None, None

    trainer, batch = make_trainer(OneSided, budget=budget), toy_groups(5)
    assert isinstance(trainer.reference, Policy) and not trainer.couples_examples
    with torch.no_grad():
        chosen = naive_token_logps(trainer.policy.lm, batch, ["chosen"])
        rejected = naive_token_logps(trainer.reference.lm, batch, ["rejected"])
    loss = sum(((rejected[i, "rejected"].sum() - chosen[i, "chosen"].sum()) / len(rejected[i, "rejected"])).item()
               for i in range(5)) / 5
    assert trainer.accumulate(batch, 5).means()["loss/train"] == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize(("loss", "declared"), [("dpo", True), ("kto-simple", False), ("kto-simple", True)])
def test_a_yaml_may_declare_a_coupling_and_cannot_deny_one(loss: str, declared: bool) -> None:
    assert make_trainer(loss, loss__couples_examples=declared).couples_examples


def test_a_coupling_that_the_probe_does_not_see_is_refused_when_a_batch_is_cut() -> None:
    """This one shows from 4 examples on, and the probe has 3: the parts' losses do not add up to the whole's."""

    class Late(PairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor) -> Losses:
            baseline = policy_chosen_logps.mean() if len(policy_chosen_logps) > 3 else 0
            return (policy_chosen_logps - baseline) ** 2, None, None

    batch = toy_groups(7, "chosen")
    assert not make_trainer(Late).couples_examples
    make_trainer(Late).accumulate(batch, len(batch))  # uncut, it is right all the same
    with pytest.raises(UserError, match=r"it couples examples\. Say so: couples_examples: true in config/loss/"):
        make_trainer(Late, budget="single").accumulate(batch, len(batch))
    make_trainer(Late, budget="single", loss__couples_examples=True).accumulate(batch, len(batch))


# What is refused ------------------------------------------------------------------------------------------------------

def test_a_loss_that_returns_a_mean_is_refused() -> None:
    class Mean(PairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor) -> Losses:
            return -policy_chosen_logps.mean(), None, None

    with pytest.raises(UserError, match=r"Mean\.loss returned losses of shape \(\), where \(3,\) is needed"):
        make_trainer(Mean)


def test_an_unpaired_loss_that_forgets_a_class_is_refused() -> None:
    """3 chosen and 3 rejected are 6 examples."""

    class Half(UnpairedPreferenceTrainer):
        def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
            return policy_rejected_logps - policy_chosen_logps, None, None

    with pytest.raises(UserError, match=r"Half\.loss returned losses of shape \(3,\), where \(6,\) is needed"):
        make_trainer(Half)


@pytest.mark.parametrize("name", ["policy_chosen_logits", "chosen_logps", "policy_chosen_lengths", "policy_kl_logps",
                                  "reference_chosen_scores", "batch"])
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def loss(self, policy_chosen_logps, {name}):\n    return -policy_chosen_logps, None, None", namespace)
    with pytest.raises(UserError, match=f"Odd.loss asks for '{name}'"):
        make_trainer(type("Odd", (PairedPreferenceTrainer,), namespace))


@pytest.mark.parametrize("loss", ["dpo", "kto", "kto-simple"])
def test_a_reference_that_is_asked_for_and_switched_off_is_refused(loss: str) -> None:
    with pytest.raises(UserError, match=r"loss\.use_reference_model: \w+\.loss asks for reference log-probs"):
        make_trainer(loss, loss__use_reference_model=False)


def test_scores_without_a_reward_head_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.reward_head: BradleyTerryTrainer\.loss asks for scores"):
        make_trainer("bradley-terry", loss__reward_head=False)


def test_a_loss_says_by_its_arguments_whether_batches_need_mismatched_pairs() -> None:
    assert {name: trainer.needs_KL() for name, trainer in TRAINERS.items()} == {
        "sft": False, "dpo": False, "kto": True, "kto-simple": False, "bradley-terry": False}


# Rows, losses and loaders that do not fit -----------------------------------------------------------------------------

@pytest.mark.parametrize(("loss", "roles", "says"), [
    ("kto", "chosen rejected", "rows of chosen and rejected; kto needs one completion in each"),
    ("dpo", "unpaired", "rows of chosen; dpo needs chosen and rejected in each"),
    ("sft", "rejected", "rows of rejected; sft needs chosen in each")])
def test_a_loader_that_gives_other_rows_than_the_loss_needs_is_refused(loss: str, roles: str, says: str) -> None:
    made = make_trainer(loss)
    nothing: Any = None
    loader: Any = [toy_groups(4, roles)]
    with pytest.raises(UserError, match=rf"loss\.dataloader: \w+ gives {says}"):
        type(made)(made.config, made.policy, made.reference, nothing, loader, nothing, Path("unused"), budget=64)


class DesirableAlone(UnpairedPreferenceTrainer):
    """Imitates what is desirable; what is not has no loss."""

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        return torch.cat([-policy_chosen_logps, torch.zeros_like(policy_rejected_logps)]), None, None


def test_a_class_without_a_loss_has_no_gradient_and_stops_nothing() -> None:
    """Cut into rows of one completion: the gradient is that of the desirable ones' losses over all 6 examples."""
    batch = make_batch("kto-simple", 6)
    assert {role for group in batch for role in group.completions} == {"chosen", "rejected"}
    trainer = make_trainer(DesirableAlone, budget="single")
    trainer.accumulate(batch, len(batch))
    sft = make_trainer("sft")
    sft.accumulate([group for group in batch if "chosen" in group.completions], len(batch))
    assert_same_gradient(trainer.policy, gradients(sft.policy))


class Overflowing(PairedPreferenceTrainer):
    """s(h / 0.05) e^-h as it stands: 0 times infinity where h is far below 0."""

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        margins = policy_chosen_logps - policy_rejected_logps
        return torch.sigmoid(margins / 0.05) * (-margins).exp(), None, None


def test_a_loss_that_overflows_is_not_taken_for_one_that_couples_examples() -> None:
    assert not make_trainer(Overflowing, loss__use_reference_model=True).couples_examples
