"""A trained reward model, read back from its run to score text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from budget import token_budget
from groups import Group, encode
from models import load_policy, load_tokenizer
from policy import Policy
from sequences import cut_into_microbatches
from settings import MARKERS
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardModel:
    """A trained reward model that scores text, for judging."""

    def __init__(self, policy: Policy, tokenizer: "PreTrainedTokenizerBase", markers: dict[str, str], max_length: int,
                 budget: int) -> None:
        self.policy, self.tokenizer, self.markers = policy, tokenizer, markers
        self.max_length, self.budget = max_length, budget

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """A reward for each completion of its formatted prompt; long ones lose the start of the prompt."""
        from tqdm import tqdm

        groups = []
        for number, (prompt, ids) in enumerate(encode(self.tokenizer, prompts, completions)):
            ids = ids[:self.max_length - 1]
            groups.append(Group(prompt[max(0, len(prompt) + len(ids) - self.max_length):], {"chosen": ids}, number))
        rewards: dict[int, float] = {}
        parts = cut_into_microbatches(groups, ["chosen"], self.budget)
        with torch.no_grad(), tqdm(total=len(groups), desc="rewards", unit="text", disable=None) as bar:
            for rows in parts:
                values = self.policy(rows, ("scores",))["scores"].tolist()
                rewards.update({number: value for (number, _), value in zip(rows.items, values, strict=True)})
                bar.update(len(values))
        return [rewards[number] for number in range(len(groups))]


def load_reward_model(path: str) -> RewardModel:
    """A run trained with a reward head, from its folder."""
    from omegaconf import DictConfig, OmegaConf

    from settings import schema

    run = Path(path).expanduser()
    if not (run / "config.yaml").is_file() or not (run / "LATEST/reward_head.pt").is_file():
        raise UserError(f"judge rm:{path}: no reward model's run: it needs config.yaml and LATEST/reward_head.pt "
                        "(train one with loss=bradley-terry)")
    config = OmegaConf.merge(schema(), OmegaConf.load(run / "config.yaml"))
    assert isinstance(config, DictConfig)
    config.model.load_from = None
    tokenizer = load_tokenizer(config, run)
    policy = load_policy(config, run / "LATEST/policy.pt").eval().requires_grad_(False)
    return RewardModel(policy, tokenizer, {key: config[key] for key in MARKERS}, config.model.max_length,
                       token_budget(config, policy))
