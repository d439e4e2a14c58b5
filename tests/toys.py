"""Small stand-ins that tests share: settings, models of several families, groups with random ids."""

import copy
import os
import random
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, PreTrainedModel

from groups import Group
from models import without_dropout
from policy import Policy
from settings import schema

V = 61
# A folder of numbers recorded from the original scripts, where one is at hand; what needs it is skipped without it.
GOLDEN = Path(os.environ.get("HALOS_GOLDEN", "no-golden-numbers-here"))
REAL = Path(os.environ.get("HALOS_REAL_DATA", "no-real-data-here"))  # a folder of real rows in the sources' schemas
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "max_position_embeddings": 128}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "tied-llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gptneox": GPTNeoXConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16),
}


def toy_config(loss: str | None = "dpo", **overrides: Any) -> DictConfig:
    """A checked run's settings: the defaults, the loss's YAML, `model__batch_size=4` and the like on top."""
    config = schema(loss)
    config.update({"exp_name": "toy", "datasets": ["demo"], "cache_dir": "unused", "local_run_dir": "unused",
                   "wandb": {"enabled": False, "entity": None, "project": "toy"}})
    config.model.update({"name_or_path": "examples/tiny", "activation_checkpointing": False, "max_length": 64,
                         "max_prompt_length": 32, "batch_size": 4, "eval_batch_size": 4})
    for key, value in overrides.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def toy_lm(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 5.0
           ) -> PreTrainedModel:
    """Random weights, larger than usual so that log-probs differ between tokens and positions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(without_dropout(copy.deepcopy(FAMILIES[family])))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return lm.to(dtype).eval()


def toy_policy(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    return Policy(toy_lm(family, seed, dtype), **options)


def toy_groups(n: int, roles: str = "chosen rejected", seed: int = 0, longest: int = 8) -> list[Group]:
    """n groups with prompts and completions of 1 to `longest` ids.

    roles: what every group has; 'unpaired' gives one of chosen and rejected to each, at random, the first chosen.
    """
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [draw.randrange(2, V) for _ in range(draw.randint(1, longest))]

    groups = []
    for key in range(n):
        mine = [("chosen", "rejected")[bool(key) and draw.random() < 0.5]] if roles == "unpaired" else roles.split()
        groups.append(Group(ids(), {role: ids() for role in mine}, key, pair=0))
    return groups
