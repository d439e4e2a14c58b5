"""What a run leaves of its policy: `policy.pt`, and a folder that other tools load as it is."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import adapters
from checkpoint import cast_state, load_state, save_states
from models import quiet_transformers
from policy import Policy
from utils import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODULES = {"reward_head": "reward_head", "v_head": "value_head"}  # of a policy, by the name of the file that keeps them


def save_policy(policy: Policy, state: Mapping[str, Tensor], tokenizer: "PreTrainedTokenizerBase", folder: Path,
                step_idx: int, metrics: Mapping[str, float], dtype: torch.dtype) -> None:
    """`policy.pt`, the heads' states where there are any, and `export/`, which other tools load as it is.

    Both hold adapters merged; by themselves these are in `adapter/`. state: the policy's, put together.
    """
    prefixes = {"lm": "lm.", **{name: f"{MODULES[name]}." for name in policy.heads()}}
    parts = {part: {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
             for part, prefix in prefixes.items()}
    if adapters.adapted(policy.lm):
        adapters.save(policy.lm, parts["lm"], folder / "adapter")
        # As they come, they may be on a GPU, whose memory two models need not fit.
        parts["lm"] = {name: tensor if name in parts["lm"] else tensor.cpu()
                       for name, tensor in adapters.merged(policy.lm, parts["lm"])}
    save_states(folder / "policy.pt", step_idx, parts["lm"], metrics, dtype)
    for name in policy.heads():
        save_states(folder / f"{name}.pt", step_idx, parts[name], metrics, torch.float32)
    lm, own, tokenizer = policy.lm, parts["lm"], copy.deepcopy(tokenizer)
    if policy.reward_head is not None:
        lm = as_classifier(policy, parts, tokenizer)
        own = lm.state_dict()
    lm.save_pretrained(folder / "export", state_dict=cast_state(own, dtype))
    tokenizer.save_pretrained(folder / "export")
    # save_pretrained writes the dtype that the model is in, and the base model's idea of where an answer ends.
    patch_json(folder / "export/config.json", dtype=str(dtype).removeprefix("torch."))
    if (folder / "export/generation_config.json").is_file():
        known = json.loads((folder / "export/generation_config.json").read_text()).get("eos_token_id")
        eos: Any = tokenizer.eos_token_id
        patch_json(folder / "export/generation_config.json", pad_token_id=tokenizer.pad_token_id,
                   eos_token_id=sorted({*known, eos}) if isinstance(known, list) else eos)
    for file in folder.rglob("*.safetensors"):  # which are written for their owner alone
        shutil.copymode(folder / "policy.pt", file)


def patch_json(file: Path, **values: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **values})


def as_classifier(policy: Policy, parts: Mapping[str, Mapping[str, Tensor]], tokenizer: Any) -> "PreTrainedModel":
    """The reward model as `transformers` knows it: a sequence classifier with one label, read at the last token.

    It takes the last token that is not padding, so that padding must not be EOS, in which a completion ends: another
    token is found for it, and given to `tokenizer`, too. Where there is none it scores one sequence at a time.
    """
    transformers = quiet_transformers()
    assert policy.reward_head is not None
    settings = copy.deepcopy(policy.lm.config)
    settings.num_labels = 1
    spare = [id for token, id in tokenizer.get_added_vocab().items() if "pad" in token.lower()]
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *spare]
    settings.pad_token_id = next((id for id in candidates if id not in (None, tokenizer.eos_token_id)
                                  and id < settings.vocab_size), None)
    if settings.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(settings.pad_token_id)
    with torch.device("meta"):
        classifier = transformers.AutoModelForSequenceClassification.from_config(settings)
    body = f"{policy.lm.base_model_prefix}."
    state = {f"{classifier.base_model_prefix}.{name.removeprefix(body)}": tensor for name, tensor in parts["lm"].items()
             if name.startswith(body)}
    load_state(classifier, {**state, "score.weight": parts["reward_head"]["weight"]}, "the reward model",
               assign=True)
    return classifier
