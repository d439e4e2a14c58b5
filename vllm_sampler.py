"""Sampling by vLLM, where that is installed: `++sampler=vllm`.

The prompts' ids, their limits and where answers end are those of `sampling.sample`; the random numbers are vLLM's own,
seeded for each prompt by the seed and the prompt's number. It needs of vLLM `LLM.generate` with a `TokensPrompt` and a
`SamplingParams` for each prompt; it was run with version 0.32.0 on a CPU, not yet on a GPU (docs/evaluation.md).
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models import find_model
from sampling import Answer, Ending, blank
from utils import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase


def load_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(f"sampler: vllm cannot be imported ({error}); install it by pip install vllm, or sample by "
                        "++sampler=own") from None


def model_folder(config: "DictConfig", weights: Path | None) -> str:
    """What vLLM is to load: the `export` beside the weights; without weights the model as it was before training."""
    if config.loss.reward_head:
        raise UserError(f"sampler: loss={config.loss.name} trains a reward model, whose export does not write answers; "
                        "take ++sampler=own")
    if weights is None:
        return find_model(config.model.name_or_path, config.cache_dir)
    folder = (weights if weights.is_dir() else weights.parent) / "export"
    if not (folder / "config.json").is_file():
        raise UserError(f"sampler: vllm loads {folder}, which is not there; name by ++saved_policy=PATH a policy.pt "
                        "that has export/ beside it, or take ++sampler=own")
    return str(folder)


def sample(config: "DictConfig", weights: Path | None, tokenizer: "PreTrainedTokenizerBase",
           prompts: Sequence[Sequence[int]], stop: str) -> list[str]:
    """An answer to each prompt; see `sampling.sample`."""
    vllm, model = load_vllm(), model_folder(config, weights)
    if not prompts:
        return []
    named = config.model.tokenizer_name_or_path
    engine = vllm.LLM(model=model, dtype=config.model.policy_dtype, max_model_len=config.model.max_length,
                      seed=config.seed, tokenizer=find_model(named, config.cache_dir) if named else model,
                      tensor_parallel_size=devices(),
                      generation_config="vllm")  # that is: nothing out of the model's generation_config.json
    answers = blank(prompts, config.model.max_length, config.seed)
    # Special tokens stay in the text, as the marker of the next turn may have some.
    limits = [vllm.SamplingParams(temperature=1.0, top_p=config.top_p, top_k=-1, max_tokens=answer.room,
                                  seed=seed_of(config.seed, answer.number), stop=[stop] if stop else None,
                                  stop_token_ids=[tokenizer.eos_token_id], skip_special_tokens=False,
                                  spaces_between_special_tokens=False) for answer in answers]
    outputs = engine.generate([vllm.TokensPrompt(prompt_token_ids=answer.prompt) for answer in answers], limits)
    ending = Ending(tokenizer, stop)
    return [text_of(answer, output.outputs[0].token_ids, ending)
            for answer, output in zip(answers, outputs, strict=True)]


def devices() -> int:
    """The GPUs that a model is spread over: a power of two, as its heads must divide."""
    return 1 << max(torch.cuda.device_count(), 1).bit_length() - 1


def seed_of(seed: int, number: int) -> int:
    """Below 2**31, and of each prompt's own."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def text_of(answer: Answer, ids: Sequence[int], ending: Ending) -> str:
    """The text of the ids, ended by our own rules: vLLM's are the same, but it may give ids after the end."""
    for id in ids:
        if ending.ends(answer, id):
            return answer.text
    return ending.text(answer.ids)
