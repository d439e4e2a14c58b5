"""The losses: one short class each, found by the name in `config/loss/NAME.yaml`.

To add one, subclass `PairedPreferenceTrainer` or `UnpairedPreferenceTrainer` and write `loss`; it is given what the
names of its arguments ask for, and reads its hyper-parameters from `self.config.loss` (see `scoring.LossTrainer`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loop import BasicTrainer, Batch
from metrics import Metrics
from scoring import Losses, LossTrainer
from utils import UserError, nearest


class PairedPreferenceTrainer(LossTrainer):
    """For losses of pairs: `loss` returns (B,), the i-th for the i-th chosen and the i-th rejected completion."""

    def compare_rewards(self, batch: Batch, chosen: Tensor, rejected: Tensor, mode: str, metrics: Metrics) -> None:
        metrics.add(f"rewards_{mode}/margins", chosen - rejected)
        metrics.add(f"rewards_{mode}/accuracies", chosen > rejected)
        metrics.add(f"rewards_{mode}/accuracies_unpaired", chosen > rejected.flip(0))


class UnpairedPreferenceTrainer(LossTrainer):
    """For losses of single completions that are known to be good or bad: `loss` returns all chosen, then all rejected.

    A batch may hold one class alone: what is asked of the other is empty, (0,). Accuracies compare the two halves of
    a pair where the batch has both; an evaluation keeps them together.
    """

    paired = False

    def compare_rewards(self, batch: Batch, chosen: Tensor, rejected: Tensor, mode: str, metrics: Metrics) -> None:
        rewards: dict[tuple[int, int], dict[str, Tensor]] = {}
        for role, values in (("chosen", chosen), ("rejected", rejected)):
            groups = [group for group in batch if role in group.completions]
            for group, value in zip(groups, values, strict=True):
                if group.pair >= 0:
                    rewards.setdefault((group.key, group.pair), {})[role] = value
        pairs = [sides for sides in rewards.values() if len(sides) == 2]
        if pairs:
            metrics.add(f"rewards_{mode}/accuracies",
                        torch.stack([sides["chosen"] > sides["rejected"] for sides in pairs]))


class SFTTrainer(LossTrainer):
    """Supervised fine-tuning: minus the log-probability of the whole completion."""

    def loss(self, policy_chosen_logps: Tensor) -> Losses:
        return -policy_chosen_logps, None, None


class DPOTrainer(PairedPreferenceTrainer):
    """Direct Preference Optimization (Rafailov et al., 2023, eq. 7).

        L = -log sigmoid(beta * (logratio(chosen) - logratio(rejected)))
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class KTOTrainer(UnpairedPreferenceTrainer):
    """Kahneman-Tversky Optimization (Ethayarajh et al., 2024, eq. 7).

        L = w_D * (1 - sigmoid(beta * (logratio - z)))  for a desirable completion
            w_U * (1 - sigmoid(beta * (z - logratio)))  for an undesirable one
        z = max(0, mean logratio of the batch's mismatched pairs), a constant
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, policy_KL_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             reference_KL_logps: Tensor) -> Losses:
        cfg = self.config.loss
        z = cfg.beta * (policy_KL_logps - reference_KL_logps).mean().clamp(min=0).detach()
        chosen_rewards = cfg.beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = cfg.beta * (policy_rejected_logps - reference_rejected_logps)
        losses = torch.cat([cfg.desirable_weight * self.shortfall(chosen_rewards - z),
                            cfg.undesirable_weight * self.shortfall(z - rejected_rewards)])
        return losses, chosen_rewards, rejected_rewards

    def shortfall(self, gain: Tensor) -> Tensor:
        return F.sigmoid(-gain)  # 1 - sigmoid(gain), without the cancellation


class BradleyTerryTrainer(PairedPreferenceTrainer):
    """A reward model: the chosen completion's score should exceed the rejected one's (Bradley and Terry, 1952).

        L = -log sigmoid(score(chosen) - score(rejected))
    """

    def loss(self, policy_chosen_scores: Tensor, policy_rejected_scores: Tensor) -> Losses:
        return (-F.logsigmoid(policy_chosen_scores - policy_rejected_scores), policy_chosen_scores,
                policy_rejected_scores)


def find_trainer(name: str) -> type[BasicTrainer]:
    """The trainer class that a loss's YAML names."""
    trainers = {key: value for key, value in globals().items()
                if isinstance(value, type) and issubclass(value, BasicTrainer)}
    if name not in trainers:
        raise UserError(f"loss.trainer: no trainer {name!r} in trainers.py (have {', '.join(trainers)})"
                        f"{nearest(name, trainers)}")
    return trainers[name]
