"""What batches log of a loss, at the start and later; and how a trainer is found. The losses: test_losses*.py."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from oracle import exact
from toy_losses import make_trainer
from toys import FAMILIES, toy_config, toy_groups, toy_lm, toy_policy

from groups import Group, with_mismatched
from metrics import Metrics
from policy import Policy
from scoring import LossTrainer
from trainers import (
    BradleyTerryTrainer,
    DPOTrainer,
    KTOTrainer,
    SFTTrainer,
    UnpairedPreferenceTrainer,
    find_trainer,
)
from utils import UserError

Ratios = Mapping[tuple[int, str], float]


# At the start, nothing has moved (law 6) ------------------------------------------------------------------------------

def start(family: str, seed: int, policy: Policy, reference: Policy) -> dict[str, float]:
    """What DPO and KTO log of a batch of 8, and the largest log-ratio of a token and of a completion."""
    pairs, singles = toy_groups(8, seed=seed, longest=12), toy_groups(8, "unpaired", seed, longest=12)
    dpo, kto = make_trainer("dpo", policy, reference), make_trainer("kto", policy, reference)
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
    means = measured(make_trainer("dpo", beta=0.1), groups_of(ratios, [0, 1, 2]), ratios, "eval").means()
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
    means = measured(make_trainer("kto", beta=0.1), batch, ratios).means()
    assert means["rewards_train/chosen"] == pytest.approx(4 / 3)
    assert means["rewards_train/rejected"] == pytest.approx(5.5 / 3)
    assert means["rewards_train/margins"] == pytest.approx(-0.5)
    assert means["rewards_train/accuracies"] == 0.5
    assert "rewards_train/accuracies_unpaired" not in means


def test_labelled_completions_without_a_pair_are_in_no_accuracy() -> None:
    """Pair -1 says that a generation was labelled by itself: two of one prompt are still no pair."""
    ratios = {(0, "chosen"): 30, (1, "rejected"): 5, (0, "KL"): 0, (1, "KL"): 0}
    means = measured(make_trainer("kto"), groups_of(ratios, [7, 7], [-1, -1]), ratios).means()
    assert means["rewards_train/margins"] == pytest.approx(2.5)
    assert "rewards_train/accuracies" not in means


@pytest.mark.parametrize(("role", "absent"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_an_absent_class_is_left_out(role: str, absent: str) -> None:
    ratios = {(0, role): 10, (1, role): 20, (0, "KL"): 0, (1, "KL"): 0}
    means = measured(make_trainer("kto", beta=0.1), groups_of(ratios, [0, 1]), ratios).means()
    assert means[f"rewards_train/{role}"] == pytest.approx(1.5)
    assert not {f"rewards_train/{absent}", f"logps_train/{absent}", "rewards_train/margins",
                "rewards_train/accuracies"} & means.keys()


def test_kl_is_logged_clamped_and_raw_with_its_error_and_its_matched_share() -> None:
    """Mismatched log-ratios -3, 1 of prompts 4, 5; then 5, 3 of prompts 6, 6. Batch means -1 and 4.

    Estimate: max(0, -1) = 0 and 4, mean 2. Raw: 6 / 4 = 1.5. Clamped: 1 of 2 batches. Matched: none of the first two
    neighbours, both of the second: 1/2. Deviations from 1.5: -4.5, -0.5, 3.5, 1.5, squares 35; error sqrt(35 / 3 / 4).
    """
    trainer, metrics = make_trainer("kto"), Metrics()
    for values, keys in (((-3, 1), [4, 5]), ((5, 3), [6, 6])):
        ratios = {(0, "chosen"): 0, (1, "rejected"): 0, (0, "KL"): values[0], (1, "KL"): values[1]}
        metrics.merge(measured(trainer, groups_of(ratios, keys, [0, 1]), ratios))
    means = {name.removeprefix("rewards_train/"): value for name, value in metrics.means().items() if "KL" in name}
    assert means == pytest.approx({"KL_estimate": 2, "KL_raw": 1.5, "KL_clamped": 0.5, "KL_matched": 0.5,
                                   "KL_stderr": math.sqrt(35 / 12)}, rel=1e-12)


def test_a_loss_without_rewards_logs_none() -> None:
    ratios = {(0, "chosen"): 4, (1, "chosen"): 2}
    means = measured(make_trainer("sft"), groups_of(ratios, [0, 1]), ratios).means()
    assert means == pytest.approx({"loss/train": 7, "logps_train/chosen": -7})


# Finding them ---------------------------------------------------------------------------------------------------------

def test_a_trainer_is_found_by_the_name_in_the_yaml() -> None:
    losses = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer, "bradley-terry": BradleyTerryTrainer}
    assert [find_trainer(toy_config(loss).loss.trainer) for loss in losses] == list(losses.values())
    assert find_trainer("UnpairedPreferenceTrainer") is UnpairedPreferenceTrainer


@pytest.mark.parametrize("name", ["KTOTrainr", "Policy", "torch", "Losses"])
def test_a_trainer_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"loss\.trainer: no trainer '{name}' in trainers\.py \(have .*KTOTrainer"):
        find_trainer(name)


def test_a_misspelt_trainer_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean 'KTOTrainer'\?"):
        find_trainer("KTOTrainr")
