"""Losses that need no reference model. Below, s is the sigmoid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Losses
from scoring import LossTrainer, PairedPreferenceTrainer


class SFTTrainer(LossTrainer):
    """Supervised fine-tuning: minus the log-probability of the whole completion.

    With control tokens at the prompt's end it is conditional fine-tuning (CSFT; Korbak et al., 2023).
    """

    def loss(self, policy_chosen_logps: Tensor) -> Losses:
        return -policy_chosen_logps, None, None


class SLiCTrainer(PairedPreferenceTrainer):
    """Sequence Likelihood Calibration with a hinge (Zhao et al., 2023), the chosen answer as its target.

        L = max(0, beta - log p_chosen + log p_rejected) - lambda_coef log p_chosen
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        cfg = self.config.loss
        hinge = (cfg.beta - policy_chosen_logps + policy_rejected_logps).clamp(min=0)
        return hinge - cfg.lambda_coef * policy_chosen_logps, policy_chosen_logps, policy_rejected_logps


class ORPOTrainer(PairedPreferenceTrainer):
    """Odds Ratio Preference Optimization, on mean log-probs (Hong et al., 2024, eq. 6 and 7).

        L = -log p_chosen - OR_scale log s(log odds_chosen - log odds_rejected),    odds = p / (1 - p)
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        chosen, rejected = log_odds(policy_chosen_logps), log_odds(policy_rejected_logps)
        return -policy_chosen_logps - self.config.loss.OR_scale * F.logsigmoid(chosen - rejected), chosen, rejected


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which is taken as -1e-8 at most: at p = 1 the odds are infinite."""
    logps = logps.clamp(max=-1e-8)
    return logps - torch.log(-torch.expm1(logps))


class SimPOTrainer(PairedPreferenceTrainer):
    """Simple Preference Optimization, on mean log-probs, with a margin to be reached (Meng et al., 2024, eq. 6).

        L = -log s(beta log p_chosen - beta log p_rejected - gamma)

    With `sft_weight` it is CPO-SimPO (`cpo-simpo`).
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        chosen, rejected = (self.config.loss.beta * logps for logps in (policy_chosen_logps, policy_rejected_logps))
        return -F.logsigmoid(chosen - rejected - self.config.loss.gamma), chosen, rejected


class CPOTrainer(PairedPreferenceTrainer):
    """Contrastive Preference Optimization: DPO against a uniform reference, and `sft_weight` (Xu et al., 2024).

        L = -log s(beta log p_chosen - beta log p_rejected)

    `sft_weight` takes the chosen answer's mean log-prob a token; the paper takes its sum.
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> Losses:
        chosen, rejected = (self.config.loss.beta * logps for logps in (policy_chosen_logps, policy_rejected_logps))
        return -F.logsigmoid(chosen - rejected), chosen, rejected


class BradleyTerryTrainer(PairedPreferenceTrainer):
    """A reward model: the chosen completion's score should exceed the rejected one's (Bradley and Terry, 1952).

        L = -log s(score_chosen - score_rejected - margin)

    A margin above 0 is that of Touvron et al. (2023, Llama 2, eq. 2), here the same for all pairs.
    """

    def loss(self, policy_chosen_scores: Tensor, policy_rejected_scores: Tensor) -> Losses:
        margins = policy_chosen_scores - policy_rejected_scores - self.config.loss.margin
        return -F.logsigmoid(margins), policy_chosen_scores, policy_rejected_scores
