"""The losses against numbers derived by hand, finite differences, golden numbers; and what their batches log."""

import copy
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from oracle import exact
from torch import Tensor
from toys import FAMILIES, toy_config, toy_groups, toy_lm, toy_policy

from groups import Group, with_mismatched
from metrics import Metrics
from models import Policy
from scoring import Losses, LossTrainer
from trainers import (
    BradleyTerryTrainer,
    DPOTrainer,
    KTOTrainer,
    PairedPreferenceTrainer,
    SFTTrainer,
    UnpairedPreferenceTrainer,
    find_trainer,
)
from utils import UserError

GOLDEN = toys.GOLDEN / "losses.json"
LOSSES: dict[type[LossTrainer], str] = {SFTTrainer: "sft", DPOTrainer: "dpo", KTOTrainer: "kto",
                                        BradleyTerryTrainer: "bradley-terry"}
Ratios = Mapping[tuple[int, str], float]


class KTOLogSigmoid(KTOTrainer):
    """A log outside: -log s instead of 1 - s."""

    def shortfall(self, gain: Tensor) -> Tensor:
        return -F.logsigmoid(gain)


class DPOSigmoid(PairedPreferenceTrainer):
    """-s of DPO's margin, through a shortfall of its own."""

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor) -> Losses:
        chosen_rewards = self.config.loss.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = self.config.loss.beta * (policy_rejected_logps - reference_rejected_logps)
        return self.shortfall(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards

    def shortfall(self, margin: Tensor) -> Tensor:
        return -F.sigmoid(margin)


def make_trainer(trainer_class: type[LossTrainer], policy: Policy | None = None, reference: Policy | None = None,
                 **hyper: Any) -> Any:
    """hyper: of the loss. Without models of its own it is good for `loss` and `measure`."""
    loss = next((LOSSES[base] for base in trainer_class.__mro__ if base in LOSSES), "dpo")
    config = toy_config(loss, **{f"loss__{key}": value for key, value in hyper.items()})
    nothing: Any = None
    return trainer_class(config, policy or any_policy(), reference or any_policy(), nothing, nothing, nothing,
                         Path("unused"), budget=48)


@cache
def any_policy() -> Policy:
    return toy_policy(reward_head=True)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


# By hand --------------------------------------------------------------------------------------------------------------

def test_sft_is_minus_the_log_prob() -> None:
    """log p = -3.5 and -0.25: losses 3.5 and 0.25, and each a slope of -1."""
    logps = numbers(-3.5, -0.25)
    losses, *rewards = make_trainer(SFTTrainer).loss(logps)
    close(losses, 3.5, 0.25)
    close(torch.autograd.grad(losses.sum(), logps)[0], -1, -1)
    assert rewards == [None, None]


def test_dpo_is_the_log_odds_of_the_margin() -> None:
    """beta 0.1, log-ratios 10 and 0, then 0 and 10, then 4 and 4: margins 1, -1, 0.

    L = log(1 + e^-m): log(1 + 1/e) = 0.3132617, log(1 + e) = 1.3132617, log 2. dL/dlogp_c = -0.1 / (1 + e^m).
    """
    chosen, rejected = numbers(-20, -30, -1), numbers(-30, -20, -2)
    losses, chosen_rewards, rejected_rewards = make_trainer(DPOTrainer, beta=0.1).loss(
        chosen, rejected, numbers(-30, -30, -5), numbers(-30, -30, -6))
    close(losses, 0.3132616875182228, 1.3132616875182228, math.log(2))
    close(chosen_rewards, 1, 0, 0.4)
    close(rejected_rewards, 0, 1, 0.4)
    slopes = 0.1 / (1 + math.e), 0.1 / (1 + 1 / math.e), 0.05
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    close(by_chosen, *(-slope for slope in slopes))
    close(by_rejected, *slopes)


def test_kto_measures_both_classes_against_the_reference_point() -> None:
    """beta 0.1; mismatched log-ratios 4 and 0: z = 2, in rewards 0.2. Weights: desirable 2, undesirable 4.

    Chosen with log-ratio 2: gain 0.2 - 0.2 = 0, L = 2 (1 - 1/2) = 1. Its slope: -2 * 0.1 * 1/2 * 1/2 = -0.05.
    Rejected with log-ratio 2 + 10 ln 3: gain -ln 3, s = 1/4, L = 4 * 3/4 = 3. Its slope: 4 * 0.1 * 1/4 * 3/4 = 0.075.
    """
    chosen, rejected, KL = numbers(-10), numbers(-10 + 10 * math.log(3)), numbers(-1, -5)
    losses, chosen_rewards, rejected_rewards = make_trainer(
        KTOTrainer, beta=0.1, desirable_weight=2.0, undesirable_weight=4.0).loss(
        chosen, rejected, KL, numbers(-12), numbers(-12), numbers(-5, -5))
    close(losses, 1, 3)
    close(chosen_rewards, 0.2)
    close(rejected_rewards, 0.2 + math.log(3))
    by_chosen, by_rejected, by_KL = torch.autograd.grad(losses.sum(), [chosen, rejected, KL], allow_unused=True)
    close(by_chosen, -0.05)
    close(by_rejected, 0.075)
    assert by_KL is None


def test_a_negative_kl_estimate_is_taken_as_zero() -> None:
    """Mismatched log-ratios -4 and 0: z = max(0, -2) = 0; log-ratio 0 is then a loss of 1/2, on both sides."""
    losses, *_ = make_trainer(KTOTrainer).loss(numbers(-7), numbers(-9), numbers(-9, -5), numbers(-7), numbers(-9),
                                               numbers(-5, -5))
    close(losses, 0.5, 0.5)


def test_kto_desirable_loss_falls_and_undesirable_loss_grows_with_the_log_ratio() -> None:
    grid = torch.linspace(-30, 30, 13, dtype=torch.float64)
    zero, KL = torch.zeros(13, dtype=torch.float64), torch.full((13,), 1.0, dtype=torch.float64)
    losses, *_ = make_trainer(KTOTrainer).loss(grid, grid, KL, zero, zero, zero)
    assert losses[:13].diff().lt(0).all()
    assert losses[13:].diff().gt(0).all()


@pytest.mark.parametrize(("absent", "expected"), [("chosen", [0.25]), ("rejected", [0.75])])
def test_kto_of_one_class_is_that_class_alone(absent: str, expected: list[float]) -> None:
    """z = 0 and beta 1, log-ratio -ln 3: 1 - s(-ln 3) = 3/4 where it is chosen, 1 - s(ln 3) = 1/4 where rejected."""
    here, nobody, KL = numbers(-5 - math.log(3)), numbers(), numbers(-6)
    policy, reference = (here, nobody), (numbers(-5), nobody)
    if absent == "chosen":
        policy, reference = policy[::-1], reference[::-1]
    losses, *rewards = make_trainer(KTOTrainer, beta=1.0).loss(*policy, KL, *reference, numbers(-5))
    close(losses, *expected)
    assert [len(values) for values in rewards] == ([0, 1] if absent == "chosen" else [1, 0])


def test_bradley_terry_is_the_log_odds_of_the_better_score() -> None:
    """Scores ln 3 and 0: P = 3/4, L = ln 4/3, slope -1/4. Scores 0 and ln 3: L = ln 4, slope -3/4."""
    chosen, rejected = numbers(math.log(3), 0), numbers(0, math.log(3))
    losses, chosen_rewards, rejected_rewards = make_trainer(BradleyTerryTrainer).loss(chosen, rejected)
    close(losses, math.log(4 / 3), math.log(4))
    assert torch.equal(chosen_rewards, chosen) and torch.equal(rejected_rewards, rejected)
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    close(by_chosen, -0.25, -0.75)
    close(by_rejected, 0.25, 0.75)


@pytest.mark.parametrize(("trainer_class", "expected"), [(KTOTrainer, [0.25, 0.75]),
                                                         (KTOLogSigmoid, [math.log(4 / 3), math.log(4)])])
def test_a_variant_of_kto_overrides_its_shortfall_alone(trainer_class: type[KTOTrainer], expected: list[float]) -> None:
    """beta 1, z = 0, log-ratio ln 3 on both sides: s of the gains is 3/4 and 1/4."""
    losses, *_ = make_trainer(trainer_class, beta=1.0).loss(
        numbers(math.log(3)), numbers(math.log(3)), numbers(0), numbers(0), numbers(0), numbers(0))
    close(losses, *expected)


def test_a_variant_of_dpo_needs_only_its_equation() -> None:
    """Rewards ln 3 and 0: -s(ln 3) = -3/4, and nothing about devices, batches or metrics."""
    losses, *_ = make_trainer(DPOSigmoid, beta=0.5).loss(numbers(2 * math.log(3)), numbers(0), numbers(0), numbers(0))
    close(losses, -0.75)


# Gradients ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainer_class", [*LOSSES, KTOLogSigmoid, DPOSigmoid])
def test_gradients_agree_with_finite_differences(trainer_class: type[LossTrainer]) -> None:
    """Of every loss with respect to every trained log-prob or score, for 4 examples a side; z is above 0."""
    trainer = make_trainer(trainer_class)
    draw = torch.Generator().manual_seed(0)
    values = {argument.name: -20 * torch.rand(4, dtype=torch.float64, generator=draw) for argument in trainer.asked}
    if "policy_KL_logps" in values:
        values["policy_KL_logps"] = values["reference_KL_logps"] + 3
    trained = [argument.name for argument in trainer.asked if argument.trained]

    def losses(*leaves: Tensor) -> Tensor:
        return trainer.loss(**{**values, **dict(zip(trained, leaves, strict=True))})[0]

    leaves = [values[name].requires_grad_() for name in trained]
    assert torch.autograd.gradcheck(losses, leaves, eps=1e-5, atol=1e-9, rtol=1e-6)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(losses(*leaves).sum(), leaves))


@pytest.mark.parametrize("trainer_class", [*LOSSES, KTOLogSigmoid, DPOSigmoid])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_log_ratios_of_ten_thousand_give_finite_losses_and_gradients(trainer_class: type[LossTrainer],
                                                                     beta: float) -> None:
    """In float32, every combination of signs of what the loss is given."""
    trainer = make_trainer(trainer_class, beta=beta)
    names = [argument.name for argument in trainer.asked]
    signs = torch.cartesian_prod(*[torch.tensor([-1e4, 1e4])] * len(names)).reshape(-1, len(names))
    for row in signs:
        values = {name: (value * torch.ones(2)).requires_grad_() for name, value in zip(names, row, strict=True)}
        losses, *_ = trainer.loss(**values)
        trained = [values[argument.name] for argument in trainer.asked if argument.trained]
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), trained))


def test_dpo_and_bradley_terry_grow_linearly_where_the_wrong_side_wins_by_far() -> None:
    """Margin -1e4: L = log(1 + e^10000) = 10000 with a slope of -1, though e^10000 overflows."""
    chosen = torch.zeros(1, requires_grad=True)
    losses, *_ = make_trainer(BradleyTerryTrainer).loss(chosen, torch.tensor([1e4]))
    zero = torch.zeros(1)
    dpo, *_ = make_trainer(DPOTrainer, beta=1.0).loss(zero, torch.tensor([1e4]), zero, zero)
    close(losses, 1e4)
    close(dpo, 1e4)
    close(torch.autograd.grad(losses, chosen)[0], -1)


def golden_cases() -> list[Any]:
    if not GOLDEN.is_file():
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason="no golden numbers here"))]
    cases = json.loads(GOLDEN.read_text())["cases"]
    return [pytest.param(case, id=case["name"]) for case in cases if case["trainer"] in GOLDEN_TRAINERS]


GOLDEN_TRAINERS = {"DPOTrainer": DPOTrainer, "KTOTrainer": KTOTrainer, "SFTTrainer": SFTTrainer,
                   "KTOLogSigmoidTrainer": KTOLogSigmoid, "DPOSigmoidTrainer": DPOSigmoid}


@pytest.mark.parametrize("case", golden_cases())
def test_losses_match_the_golden_numbers(case: dict[str, Any]) -> None:
    """Losses, rewards, and gradients of the mean loss; in float32, as they were recorded."""
    trainer = make_trainer(GOLDEN_TRAINERS[case["trainer"]], **case["hyper"])
    assert [argument.name for argument in trainer.asked] == case["arg_order"]
    inputs = {name: torch.tensor([float(x) for x in values], requires_grad=True)
              for name, values in case["inputs"].items()}
    losses, chosen_rewards, rejected_rewards = trainer.loss(**inputs)
    results = {"losses": losses, "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    for name, values in results.items():
        expected = torch.tensor([float(x) for x in case["outputs"][name]])
        torch.testing.assert_close(values.detach(), expected, rtol=1e-5, atol=1e-6)
    for name, expected in case["grads_of_mean_loss"].items():
        gradient, = torch.autograd.grad(losses.mean(), inputs[name], retain_graph=True, allow_unused=True)
        if expected is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, torch.tensor([float(x) for x in expected]), rtol=1e-5, atol=1e-8)


# At the start, nothing has moved (law 6) ------------------------------------------------------------------------------

def start(family: str, seed: int, policy: Policy, reference: Policy) -> dict[str, float]:
    """What DPO and KTO log of a batch of 8, and the largest log-ratio of a token and of a completion."""
    pairs, singles = toy_groups(8, seed=seed, longest=12), toy_groups(8, "unpaired", seed, longest=12)
    dpo, kto = make_trainer(DPOTrainer, policy, reference), make_trainer(KTOTrainer, policy, reference)
    means = {f"dpo/{key}": value for key, value in dpo.accumulate(pairs, 8).means().items()}
    means |= {f"kto/{key}": value for key, value in kto.accumulate(with_mismatched(singles, 64), 8).means().items()}
    logps, base = (dpo.scored(side, pairs)["token_logps"] for side in ("policy", "reference"))
    means["token"] = max((logps[item] - base[item]).abs().max().item() for item in logps)
    means["completion"] = max((logps[item] - base[item]).sum().abs().item() for item in logps)
    return means


REWARDS = ["dpo/rewards_train/chosen", "dpo/rewards_train/rejected", "dpo/rewards_train/margins",
           "kto/rewards_train/chosen", "kto/rewards_train/rejected", "kto/rewards_train/margins"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_at_the_start_nothing_has_moved(family: str, dtype: torch.dtype, bound: float) -> None:
    """Policy = reference: rewards 0, DPO log 2, KTO 1/2, KL 0; and no chosen reward is above its rejected one."""
    policy = toy_policy(family, 0, dtype)
    policy = exact(policy) if dtype == torch.float64 else policy
    means = start(family, 0, policy, Policy(copy.deepcopy(policy.lm)).requires_grad_(False))
    assert means["dpo/loss/train"] == pytest.approx(math.log(2), abs=bound)
    assert means["kto/loss/train"] == pytest.approx(0.5, abs=bound)
    assert [means[name] for name in REWARDS] == pytest.approx([0] * len(REWARDS), abs=bound)
    assert means["kto/rewards_train/KL_raw"] == pytest.approx(0, abs=bound)
    assert means["kto/rewards_train/KL_estimate"] == pytest.approx(0, abs=bound)
    assert means["dpo/rewards_train/accuracies"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_little_has_moved_in_bfloat16(family: str) -> None:
    """Policy: float32 weights under autocast; reference: stored in bfloat16.

    Measured over 8 seeds and all families: a token's log-ratio 0.018 nats, a completion's 0.046, KL 0.015, DPO off by
    6e-4, KTO by 3.9e-4, means of rewards and margins by 2.3e-3. The bounds are twice that.
    """
    for seed in range(2):
        lm = toy_lm(family, seed, torch.float32)
        reference = Policy(copy.deepcopy(lm).bfloat16(), dtype=torch.bfloat16).requires_grad_(False)
        means = start(family, seed, Policy(lm, dtype=torch.bfloat16), reference)
        assert 0 < means["token"] < 0.036
        assert means["completion"] < 0.092
        assert abs(means["kto/rewards_train/KL_raw"]) < 0.03
        assert means["dpo/loss/train"] == pytest.approx(math.log(2), abs=1.2e-3)
        assert means["kto/loss/train"] == pytest.approx(0.5, abs=8e-4)
        assert max(abs(means[name]) for name in REWARDS) < 4.6e-3


# What a batch logs ----------------------------------------------------------------------------------------------------

def measured(trainer: LossTrainer, batch: list[Group], ratios: Ratios, mode: str = "train") -> Metrics:
    """The metrics of a batch whose completions have these log-ratios; the reference's log-prob is -10 for each."""
    policy, reference = ({item: torch.tensor([base + own * ratio], dtype=torch.float64)
                          for item, ratio in ratios.items()} for base, own in ((-10, 1), (-10, 0)))
    found = {"policy": {"token_logps": policy}, "reference": {"token_logps": reference}}
    return trainer.measure(batch, found, mode)[1]


def groups_of(ratios: Ratios, keys: list[int], pairs: list[int] | None = None) -> list[Group]:
    return [Group([1], {role: [2] for number, role in ratios if number == i}, key, pair)
            for i, (key, pair) in enumerate(zip(keys, pairs or [0] * len(keys), strict=True))]


def test_pairs_log_their_margins_and_accuracies() -> None:
    """beta 0.1, log-ratios 30, 10, 15 against 20, 10, 5: rewards 3, 1, 1.5 and 2, 1, 0.5.

    Margins 1, 0, 1: mean 2/3. A tie is no win: accuracy 2/3. Against the flipped 0.5, 1, 2: win, tie, loss: 1/3.
    """
    ratios = {(0, "chosen"): 30, (0, "rejected"): 20, (1, "chosen"): 10, (1, "rejected"): 10, (2, "chosen"): 15,
              (2, "rejected"): 5}
    means = measured(make_trainer(DPOTrainer, beta=0.1), groups_of(ratios, [0, 1, 2]), ratios, "eval").means()
    loss = (2 * math.log(1 + 1 / math.e) + math.log(2)) / 3
    assert means == pytest.approx({
        "loss/eval": loss, "rewards_eval/chosen": 5.5 / 3, "rewards_eval/rejected": 3.5 / 3,
        "rewards_eval/margins": 2 / 3, "rewards_eval/accuracies": 2 / 3, "rewards_eval/accuracies_unpaired": 1 / 3,
        "logps_eval/chosen": -10 + 55 / 3, "logps_eval/rejected": -10 + 35 / 3}, rel=1e-12)


def test_unpaired_classes_log_the_difference_of_their_means_and_accuracies_of_complete_pairs() -> None:
    """beta 0.1, rewards: chosen 3, 1, 0; rejected 0.5, 1, 4. Margins 4/3 - 5.5/3 = -0.5.

    Pairs (key, pair): (7, 0) is 3 against 0.5, won; (7, 1) is 1 against 1, a tie; (8, 0) is chosen alone, (9, 0)
    rejected alone. Accuracy 1/2.
    """
    ratios = {(0, "chosen"): 30, (1, "rejected"): 5, (2, "rejected"): 10, (3, "chosen"): 10, (4, "chosen"): 0,
              (5, "rejected"): 40}
    ratios |= {(i, "KL"): 0 for i in range(6)}
    batch = groups_of(ratios, [7, 7, 7, 7, 8, 9], [0, 0, 1, 1, 0, 0])
    means = measured(make_trainer(KTOTrainer, beta=0.1), batch, ratios).means()
    assert means["rewards_train/chosen"] == pytest.approx(4 / 3)
    assert means["rewards_train/rejected"] == pytest.approx(5.5 / 3)
    assert means["rewards_train/margins"] == pytest.approx(-0.5)
    assert means["rewards_train/accuracies"] == 0.5
    assert "rewards_train/accuracies_unpaired" not in means


def test_labelled_completions_without_a_pair_are_in_no_accuracy() -> None:
    """Pair -1 says that a generation was labelled by itself: two of one prompt are still no pair."""
    ratios = {(0, "chosen"): 30, (1, "rejected"): 5, (0, "KL"): 0, (1, "KL"): 0}
    means = measured(make_trainer(KTOTrainer), groups_of(ratios, [7, 7], [-1, -1]), ratios).means()
    assert means["rewards_train/margins"] == pytest.approx(2.5)
    assert "rewards_train/accuracies" not in means


@pytest.mark.parametrize(("role", "absent"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_an_absent_class_is_left_out(role: str, absent: str) -> None:
    ratios = {(0, role): 10, (1, role): 20, (0, "KL"): 0, (1, "KL"): 0}
    means = measured(make_trainer(KTOTrainer, beta=0.1), groups_of(ratios, [0, 1]), ratios).means()
    assert means[f"rewards_train/{role}"] == pytest.approx(1.5)
    assert not {f"rewards_train/{absent}", f"logps_train/{absent}", "rewards_train/margins",
                "rewards_train/accuracies"} & means.keys()


def test_kl_is_logged_clamped_and_raw_with_its_error_and_its_matched_share() -> None:
    """Mismatched log-ratios -3, 1 of prompts 4, 5; then 5, 3 of prompts 6, 6. Batch means -1 and 4.

    Estimate: max(0, -1) = 0 and 4, mean 2. Raw: 6 / 4 = 1.5. Clamped: 1 of 2 batches. Matched: none of the first two
    neighbours, both of the second: 1/2. Deviations from 1.5: -4.5, -0.5, 3.5, 1.5, squares 35; error sqrt(35 / 3 / 4).
    """
    trainer, metrics = make_trainer(KTOTrainer), Metrics()
    for values, keys in (((-3, 1), [4, 5]), ((5, 3), [6, 6])):
        ratios = {(0, "chosen"): 0, (1, "rejected"): 0, (0, "KL"): values[0], (1, "KL"): values[1]}
        metrics.merge(measured(trainer, groups_of(ratios, keys, [0, 1]), ratios))
    means = {name.removeprefix("rewards_train/"): value for name, value in metrics.means().items() if "KL" in name}
    assert means == pytest.approx({"KL_estimate": 2, "KL_raw": 1.5, "KL_clamped": 0.5, "KL_matched": 0.5,
                                   "KL_stderr": math.sqrt(35 / 12)}, rel=1e-12)


def test_a_loss_without_rewards_logs_none() -> None:
    ratios = {(0, "chosen"): 4, (1, "chosen"): 2}
    means = measured(make_trainer(SFTTrainer), groups_of(ratios, [0, 1]), ratios).means()
    assert means == pytest.approx({"loss/train": 7, "logps_train/chosen": -7})


# Finding them ---------------------------------------------------------------------------------------------------------

def test_a_trainer_is_found_by_the_name_in_the_yaml() -> None:
    assert [find_trainer(toy_config(loss).loss.trainer) for loss in LOSSES.values()] == list(LOSSES)
    assert find_trainer("UnpairedPreferenceTrainer") is UnpairedPreferenceTrainer


@pytest.mark.parametrize("name", ["KTOTrainr", "Policy", "torch", "Losses"])
def test_a_trainer_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"loss\.trainer: no trainer '{name}' in trainers\.py \(have .*KTOTrainer"):
        find_trainer(name)


def test_a_misspelt_trainer_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'KTOTrainer'\?"):
        find_trainer("KTOTrainr")
