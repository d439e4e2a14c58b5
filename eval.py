"""Sample from a run, or evaluate it: `python eval.py --config-path=RUN/config.yaml ++mode=sample ++n_samples=512`.

Without a run: `python eval.py model=NAME loss=sft datasets=[demo] exp_name=base ++mode=sample ++saved_policy=null`.
`++mode=alpacaeval` answers AlpacaEval's instructions; `++datasets=[alpacaeval:FILE]` reads them from a copy.
"""

import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import first_rank_first, rank, ranks
from launching import on_every_device
from settings import entry_point, overridden, run_folder
from utils import UserError, require_writable, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from dataloader import DataLoader, Example
    from logp_store import CachedReference
    from policy import Policy


def run(config: "DictConfig") -> None:
    modes = {"sample": sample, "eval": evaluate, "alpacaeval": alpacaeval}
    if config.mode not in modes:
        raise UserError(f"mode: eval.py has {', '.join(modes)}, got {config.mode!r}; add ++mode=sample")
    if config.sampler == "vllm" and config.mode != "eval":
        if ranks() > 1:
            raise UserError("sampler: vllm starts a process a GPU by itself; start eval.py without torchrun, or take "
                            "++sampler=own")
        modes[config.mode](config)
    else:
        on_every_device(config, lambda: modes[config.mode](config))


def weights_of(config: "DictConfig") -> Path | None:
    """The policy to evaluate; None is the model as it was before any training, which an explicit null asks for.

    A run that was moved is read where --config-path found it.
    """
    folder = run_folder(config)
    here = folder / "LATEST/policy.pt"
    if overridden("saved_policy") and config.saved_policy is None:
        return None
    saved = Path(config.saved_policy).expanduser() if config.saved_policy is not None else here
    chosen = here if here.exists() and not overridden("saved_policy") else saved
    if not chosen.exists():
        raise UserError(f"saved_policy: no {chosen}; train the run first, name a checkpoint by ++saved_policy=PATH, or "
                        "take the unaligned model by ++saved_policy=null")
    return chosen


def sample(config: "DictConfig") -> None:
    """Write `{samples_dir}/{exp_name}.json`: held-out prompts, the answer to imitate, and the policy's own."""
    from omegaconf import OmegaConf

    from dataloader import load_datasets

    weights, file = weights_of(config), samples_file(config, f"{config.exp_name}.json")
    with first_rank_first():
        examples = pick(list(load_datasets(config, "test").values()), config.n_samples, config.seed)
    answers = answer(config, weights, examples)
    if rank() > 0:
        return
    write_json(file, {
        "sampled_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": OmegaConf.to_container(config),
        "samples": [{"prompt": example.prompt, "chosen": target(example).removesuffix(config.assistant_suffix),
                     "policy": text, "dataset": example.dataset_name}
                    for example, text in zip(examples, answers, strict=True)]})
    print(f"wrote {len(answers):,} samples to {file}", file=sys.stderr)


def alpacaeval(config: "DictConfig") -> None:
    """Write `{samples_dir}/alpaca_{exp_name}.json`: the answer to each of AlpacaEval's instructions, in their order.

    Of `datasets` only `alpacaeval` and `alpacaeval:PATH` are looked at; without them it is read from the Hub.
    """
    from dataloader import load_datasets

    weights, file = weights_of(config), samples_file(config, f"alpaca_{config.exp_name}.json")
    named = [name for name in config.datasets if re.match(r"alpacaeval([:?]|$)", name)]
    instructions = config.copy()
    instructions.datasets = named or ["alpacaeval"]
    with first_rank_first():
        examples = list(load_datasets(instructions, "test").values())
    answers = answer(config, weights, examples)
    if rank() > 0:
        return
    suffix = config.assistant_suffix
    write_json(file, [
        {"instruction": example.original_prompt.strip(), "output": text.strip(),
         "reference": target(example).removesuffix(suffix).strip(), "generator": config.exp_name}
        for example, text in zip(examples, answers, strict=True)])
    print(f"wrote {len(answers):,} answers to {file}", file=sys.stderr)


def samples_file(config: "DictConfig", name: str) -> Path:
    """Where the samples go; a folder that takes no file is refused before anything is sampled."""
    folder = Path(config.samples_dir).expanduser()
    require_writable("samples_dir", folder)
    return folder / name


def answer(config: "DictConfig", weights: Path | None, examples: "list[Example]") -> list[str]:
    """What the policy answers to each prompt, without the marker that ends an answer."""
    import models
    import vllm_sampler

    with first_rank_first():
        tokenizer, stop = models.load_tokenizer(config, run_folder(config)), config.human_prefix.rstrip()
    # A model that was never trained after the good token is not asked after it.
    prompts = prompt_ids(examples, tokenizer, config, config.loss.chosen_control_token if weights else None)
    by = {"own": own_answers, "vllm": vllm_sampler.sample}[config.sampler]
    return [text.removesuffix(config.assistant_suffix) for text in by(config, weights, tokenizer, prompts, stop)]


def own_answers(config: "DictConfig", weights: Path | None, tokenizer: "PreTrainedTokenizerBase",
                prompts: list[list[int]], stop: str) -> list[str]:
    from tqdm import tqdm

    import models
    import sampling

    # Stored as it computes: autocast would cast every weight again for every token.
    dtype = models.compute_dtype(config.model.policy_dtype)
    policy = models.load_policy(config, weights, aligned=weights is not None, stored=dtype).eval()
    with tqdm(total=-(-len(prompts) // ranks()), desc="sample", unit="prompt", disable=rank() > 0 or None) as bar:
        return sampling.sample(policy, tokenizer, prompts, max_length=config.model.max_length, top_p=config.top_p,
                               seed=config.seed, stop=stop, batch_size=config.model.eval_batch_size,
                               advance=bar.update)


def pick(examples: "list[Example]", n: int | None, seed: int) -> "list[Example]":
    """n of the examples (all of them, if there are fewer or n is None), the same whatever the model is."""
    import random

    chosen = list(examples)
    random.Random(f"{seed}/samples").shuffle(chosen)
    if n is not None and n > len(chosen):
        print(f"note: n_samples={n:,}, but there are {len(chosen):,} held-out prompts", file=sys.stderr)
    return chosen[:n]


def target(example: "Example") -> str:
    """The answer to imitate; empty where the data has none but bad ones."""
    index = example.sft_target()
    return "" if index is None else example.generations[index]


def prompt_ids(examples: "list[Example]", tokenizer: "PreTrainedTokenizerBase", config: "DictConfig",
               token: str | None = None) -> list[list[int]]:
    """Each prompt's ids, cut to max_prompt_length (by ids) at the end that its data set says, and the control token."""
    from batches import control_id
    from groups import cut_prompt, encode, starts_with_bos

    limit = min(config.model.max_prompt_length, config.model.max_length - 1)
    control = [control_id(tokenizer, token)] if token else []
    encoded = encode(tokenizer, [example.prompt for example in examples], [""] * len(examples))
    return [cut_prompt(prompt + control, config.model.max_length, config.model.max_length, limit,
                       example.truncation_mode, head=int(starts_with_bos(tokenizer)), tail=len(control))
            for example, (prompt, _) in zip(examples, encoded, strict=True)]


def evaluate(config: "DictConfig") -> None:
    """Print the held-out metrics as JSON, and keep them in the run's folder."""
    import adapters
    import models
    from budget import token_budget
    from dataloader import make_loader
    from policy import shares_prompts
    from reference import opened
    from trainers import find_trainer

    adapters.check(config)
    weights = weights_of(config)
    trainer_class = find_trainer(config.loss.trainer)
    trainer_class.check(config)
    folder = run_folder(config)
    find_cache(config, folder)
    with first_rank_first():
        tokenizer = models.load_tokenizer(config, folder)
        loader = make_loader(config, tokenizer, "test", with_KL=trainer_class.needs_KL())
    with opened(initial_reference(config, trainer_class.reference_roles(), loader)) as reference:
        policy = models.load_policy(config, weights, aligned=weights is not None, sharded=True).eval()
        share = bool(config.model.share_prompts) and shares_prompts(policy)
        results = trainer_class(config, policy, reference, tokenizer, None, loader, folder,
                                budget=token_budget(config, policy), share=share).evaluate()
    if rank() > 0:
        return
    report = {"metadata": {"exp_name": config.exp_name, "datasets": list(config.datasets), "split": "test",
                           "examples": len(loader), "policy": str(weights or config.model.name_or_path),
                           "reference": str(models.load_from(config) or config.model.name_or_path)
                           if config.loss.use_reference_model else None,
                           "evaluated_at": datetime.now().astimezone().isoformat(timespec="seconds")},
              "results": results}
    print(json.dumps(report, indent=2))
    which = "" if not overridden("saved_policy") else f"-{weights.parent.name}" if weights else "-unaligned"
    write_json(folder / f"eval{which}.json", report)


def initial_reference(config: "DictConfig", roles: "Sequence[str]",
                      loader: "DataLoader") -> "Policy | CachedReference | None":
    """The reference: the policy before training. Where it is cached, no model of it is left when this returns."""
    import models
    from budget import token_budget
    from policy import shares_prompts
    from reference import is_cached, prepare_reference

    if not config.loss.use_reference_model:
        return None
    policy = models.load_policy(config, sharded=True)
    if not is_cached(config, roles):
        return models.make_reference(config, policy)
    share = bool(config.model.share_prompts) and shares_prompts(policy)
    return prepare_reference(config, policy, roles, [loader], token_budget(config, policy), share)


def find_cache(config: "DictConfig", run: Path) -> None:
    """Where a run was moved, what stood beside it may stand beside it now; what may not be written to is only read."""
    if not Path(config.cache_dir).expanduser().is_dir():
        config.cache_dir = str(run.absolute().parent)
    if config.loss.use_reference_model and config.reference == "cached":
        try:
            require_writable("cache_dir", Path(config.cache_dir).expanduser())
        except UserError as error:
            print(f"note: {error}; the reference is computed live", file=sys.stderr)
            config.reference = "live"


main = entry_point(run)

if __name__ == "__main__":
    main()
