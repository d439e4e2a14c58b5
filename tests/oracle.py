"""What the fast path is measured by: a padded sequence a row, full logits, live models, plain autograd, in float64.

It shares no line with sequences.py and scoring.py, and is slow on purpose. The losses are written out from papers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groups import Group
from models import Policy

Item = tuple[int, str]  # number of the group, role
Values = Mapping[str, Tensor]  # role -> (n,) log-probs or scores of the groups that have it, in order
Rewards = dict[str, Tensor]


def exact(policy: Policy) -> Policy:
    """The policy with RMS norms in its own precision: `transformers` has them in float32, which is off by 1e-7."""
    for parent in list(policy.lm.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm: Any = child
                own = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                own.weight = norm.weight
                setattr(parent, name, own)
    return policy


def padded(groups: Sequence[Group], roles: Sequence[str]) -> tuple[list[Item], Tensor, Tensor, Tensor]:
    """Items (N), and input ids, attention mask and labels, (N, T) each: prompt, completion, padding on the right."""
    items = [(i, role) for i, group in enumerate(groups) for role in roles if role in group.completions]
    T = max((len(groups[i].prompt) + len(groups[i].completions[role]) for i, role in items), default=1)
    input_ids, attention_mask = torch.zeros(len(items), T, dtype=torch.long), torch.zeros(len(items), T).long()
    labels = torch.full((len(items), T), -100)
    for row, (i, role) in enumerate(items):
        prompt, completion = list(groups[i].prompt), list(groups[i].completions[role])
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        labels[row, len(prompt):end] = torch.tensor(completion)
    return items, input_ids, attention_mask, labels


def token_logps(lm: PreTrainedModel, groups: Sequence[Group], roles: Sequence[str]) -> dict[Item, Tensor]:
    """Log-probability of every completion id, (T,) a completion, by one forward of plain `transformers`."""
    items, input_ids, attention_mask, labels = padded(groups, roles)
    if not items:
        return {}
    logits = lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.double()
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]  # (N, T - 1)
    return {item: logps[row, labels[row, 1:] != -100] for row, item in enumerate(items)}


def scores(policy: Policy, groups: Sequence[Group], roles: Sequence[str]) -> dict[Item, Tensor]:
    """The reward head on the hidden state of each completion's last id."""
    items, input_ids, attention_mask, _ = padded(groups, roles)
    hidden = policy.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                       output_hidden_states=True).hidden_states[-1].double()
    assert policy.reward_head is not None
    weight = policy.reward_head.weight[0].double()
    return {item: hidden[row, attention_mask[row].sum() - 1] @ weight for row, item in enumerate(items)}


# Losses of a whole batch: log-probs by role, of the policy and the reference -> losses, rewards -----------------------

def sft(policy: Values, reference: Values, cfg: Any) -> tuple[Tensor, Rewards]:
    """L = -log p(y | x)"""
    return -policy["chosen"], {}


def dpo(policy: Values, reference: Values, cfg: Any) -> tuple[Tensor, Rewards]:
    """Rafailov et al. 2023, eq. 7: L = -log s(b log(p(y_w) / ref(y_w)) - b log(p(y_l) / ref(y_l)))"""
    rewards = {role: cfg.beta * (policy[role] - reference[role]) for role in ("chosen", "rejected")}
    return (1 + (rewards["rejected"] - rewards["chosen"]).exp()).log(), rewards


def kto(policy: Values, reference: Values, cfg: Any) -> tuple[Tensor, Rewards]:
    """Ethayarajh et al. 2024, eq. 7: w_D (1 - s(b (r - z))), w_U (1 - s(b (z - r))), z = max(0, mean r(x, y')) fixed"""
    z = max(0.0, float((policy["KL"] - reference["KL"]).detach().sum()) / len(policy["KL"]))
    return against(policy, reference, cfg, z, z)


def coupled(policy: Values, reference: Values, cfg: Any) -> tuple[Tensor, Rewards]:
    """KTO without KL pairs: a class's reference point is max(0, mean r of the other), 0 where that is absent"""
    ratios = {role: policy[role] - reference[role] for role in ("chosen", "rejected")}
    points = {role: max(r.sum() / len(r), 0 * r.sum()) if len(r) else 0.0 for role, r in ratios.items()}
    return against(policy, reference, cfg, points["rejected"], points["chosen"])


def against(policy: Values, reference: Values, cfg: Any, chosen_point: Tensor | float,
            rejected_point: Tensor | float) -> tuple[Tensor, Rewards]:
    gain = cfg.beta * (policy["chosen"] - reference["chosen"] - chosen_point)
    loss = cfg.beta * (rejected_point - (policy["rejected"] - reference["rejected"]))
    losses = torch.cat([cfg.desirable_weight / (1 + gain.exp()), cfg.undesirable_weight / (1 + loss.exp())])
    return losses, {role: cfg.beta * (policy[role] - reference[role]) for role in ("chosen", "rejected")}


def bradley_terry(policy: Values, reference: Values, cfg: Any) -> tuple[Tensor, Rewards]:
    """Bradley and Terry 1952: P(chosen over rejected) = e^s_c / (e^s_c + e^s_r), L = -log P"""
    chosen, rejected = policy["chosen"], policy["rejected"]
    return -(chosen.exp() / (chosen.exp() + rejected.exp())).log(), {"chosen": chosen, "rejected": rejected}


@dataclass(frozen=True)
class Loss:
    of: Callable[[Values, Values, Any], tuple[Tensor, Rewards]]
    roles: Sequence[str]
    paired: bool = True
    on_scores: bool = False


LOSSES = {"sft": Loss(sft, ["chosen"]),
          "dpo": Loss(dpo, ["chosen", "rejected"]),
          "kto": Loss(kto, ["chosen", "rejected", "KL"], paired=False),
          "coupled": Loss(coupled, ["chosen", "rejected"], paired=False),
          "bradley-terry": Loss(bradley_terry, ["chosen", "rejected"], on_scores=True)}


# A batch --------------------------------------------------------------------------------------------------------------

@dataclass
class Naive:
    """A batch's loss, and the gradient of its mean with respect to every parameter, by name."""

    losses: Tensor
    rewards: Rewards
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    token_logps: dict[Item, Tensor] = field(default_factory=dict)  # of the policy


def naive(name: str, policy: Policy, reference: Policy | None, groups: Sequence[Group], cfg: Any) -> Naive:
    """cfg: the loss's hyper-parameters, as `config.loss` has them."""
    loss = LOSSES[name]
    tokens = {} if loss.on_scores else token_logps(policy.lm, groups, loss.roles)
    found = scores(policy, groups, loss.roles) if loss.on_scores else {item: t.sum() for item, t in tokens.items()}
    with torch.no_grad():
        base = {} if reference is None else {
            item: t.sum() for item, t in token_logps(reference.lm, groups, loss.roles).items()}
    by_role = [{role: stacked(side, role) for role in loss.roles} for side in (found, base)]
    losses, rewards = loss.of(by_role[0], by_role[1], cfg)
    parameters = dict(policy.named_parameters())
    gradients = torch.autograd.grad(losses.sum() / len(losses), list(parameters.values()), allow_unused=True,
                                    materialize_grads=True)
    rewards = {role: values.detach() for role, values in rewards.items()}
    logps = {} if loss.on_scores else by_role[0]
    return Naive(losses.detach(), rewards, dict(zip(parameters, gradients, strict=True)),
                 metrics(groups, losses, rewards, logps, by_role[1], loss.paired), tokens)


def stacked(found: Mapping[Item, Tensor], role: str) -> Tensor:
    values = [value for (_, r), value in found.items() if r == role]
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def metrics(groups: Sequence[Group], losses: Tensor, rewards: Rewards, logps: Values, base: Values,
            paired: bool) -> dict[str, float]:
    """What a batch of training logs, under the names that users know."""
    values: dict[str, list[float]] = {"loss/train": losses.tolist()}
    for role in ("chosen", "rejected"):
        values[f"logps_train/{role}"] = logps[role].tolist() if role in logps else []
        values[f"rewards_train/{role}"] = rewards[role].tolist() if role in rewards else []
    chosen, rejected = values["rewards_train/chosen"], values["rewards_train/rejected"]
    if paired:
        pairs = list(zip(chosen, rejected, strict=True))
        values["rewards_train/margins"] = [c - r for c, r in pairs]
        values["rewards_train/accuracies_unpaired"] = [c > r for c, r in zip(chosen, rejected[::-1], strict=True)]
    else:
        sides = [{(group.key, group.pair): value for group, value in zip(
            [group for group in groups if role in group.completions], values[f"rewards_train/{role}"], strict=True)}
            for role in ("chosen", "rejected")]
        pairs = [(sides[0][pair], sides[1][pair]) for pair in sides[0] if pair in sides[1]]
        values["rewards_train/margins"] = [mean(chosen) - mean(rejected)] if chosen and rejected else []
    values["rewards_train/accuracies"] = [c > r for c, r in pairs]
    if "KL" in logps:
        ratios = (logps["KL"] - base["KL"]).tolist()
        n, centre = len(ratios), mean(ratios)
        values["rewards_train/KL_raw"], values["rewards_train/KL_estimate"] = ratios, [max(0.0, centre)]
        values["rewards_train/KL_clamped"] = [centre < 0]
        values["rewards_train/KL_stderr"] = [math.sqrt(sum((r - centre) ** 2 for r in ratios) / (n - 1) / n)]
        values["rewards_train/KL_matched"] = [g.key == groups[(i + 1) % n].key for i, g in enumerate(groups)]
    return {name: mean(numbers) for name, numbers in values.items() if numbers}


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
