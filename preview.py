"""What a run would see: `python dataloader.py datasets=[demo] model=tiny loss=kto` counts rows and prints a few.

It takes the settings of `train.py`, without `exp_name`, and reads the data and the tokenizer, but no weights.
"""

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from groups import Group, Ids
from settings import entry_point

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from dataloader import DataLoader

SHOWN, LONGEST = 3, 160  # rows that are printed, and tokens of a text beyond which its middle is left out
DIM, GREEN, CYAN, RESET = "\x1b[2m", "\x1b[32m", "\x1b[36m", "\x1b[0m"


def run(config: "DictConfig") -> None:
    import models
    from dataloader import make_loader
    from trainers import find_trainer

    with_KL = find_trainer(config.loss.trainer).needs_KL()
    tokenizer = models.load_tokenizer(config)
    loaders = [make_loader(config, tokenizer, split, with_KL=with_KL) for split in ("train", "test")]
    text = "\n\n".join([*map(summary, loaders), first_rows(loaders[0], wants_colour())])
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer must not fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Counts --------------------------------------------------------------------------------------------------------------

def summary(loader: "DataLoader") -> str:
    """A line for each thing to know about a split; lengths are those before any cut."""
    rows, examples = loader.epoch_rows, loader.examples
    of_prompts = examples.prompt_lengths(np.unique(rows.numbers).astype(np.int64))
    pairs, labels = 0, Counter[bool | None]()
    for example in examples:
        pairs += len(example.pairs)
        labels.update(example.desirable)
    prompts, kept, completions = loader.lengths(rows)
    filled = rows.filled[rows.kind]
    cut = filled & (completions > loader.max_length - kept[:, None])
    texts = np.stack([np.broadcast_to(rows.numbers[:, None], filled.shape)[filled], rows.indices[filled]], axis=1)
    _, different = np.unique(texts, axis=0, return_index=True)
    kinds = Counter({kind(*found): int(count) for found, count in
                     zip(rows.kinds, np.bincount(rows.kind, minlength=len(rows.kinds)), strict=True) if count})
    lines = {
        "prompts": f"{len(examples):,}",
        "pairs": f"{pairs:,}",
        "labels": f"{labels[True]:,} good, {labels[False]:,} bad",
        "rows": f"{len(rows):,} an epoch ({', '.join(f'{count:,} {name}' for name, count in sorted(kinds.items()))}), "
                f"{len(loader):,} in all, {loader.batch_size:,} a batch",
        "prompt": f"{lengths(of_prompts.tolist())}; {(kept < prompts).sum():,} of {len(rows):,} cut to "
                  f"model.max_prompt_length={loader.max_prompt_length}",
        "completion": f"{lengths(completions[filled][different].tolist())}; "
                      f"{cut.sum():,} of {filled.sum():,} cut by model.max_length={loader.max_length}",
        "left out": "; ".join(f"{count:,} {why}" for why, count in loader.left_out.items()) or "nothing"}
    return "\n".join([f"{loader.split}: {type(loader).__name__}",
                      *(f"  {name:<12}{line}" for name, line in lines.items())])


def kind(roles: Sequence[str], control: str) -> str:
    return " + ".join(roles) + (f" after {control}" if control else "")


def lengths(values: Sequence[int]) -> str:
    """Median, 95th percentile (both by nearest rank) and maximum, of at least one number of tokens."""
    ranked = sorted(values)
    median, most = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95))
    return f"median {median:,}, 95% within {most:,}, longest {ranked[-1]:,} tokens"


# Rows ----------------------------------------------------------------------------------------------------------------

def first_rows(loader: "DataLoader", coloured: bool) -> str:
    groups = next(iter(loader))[:SHOWN]
    scored = "the green ones" if coloured else "those in brackets"
    borrowed = "; KL is another row's completion" if loader.with_KL else ""
    blocks = [f"The first {len(groups)} training rows, token by token; scored are {scored}{borrowed}."]
    for number, group in enumerate(groups, 1):
        weight = f", weight {group.weight:g}" if group.weight != 1 else ""
        blocks.append("\n".join([f"row {number}{weight}", *shown(group, loader.tokenizer, coloured)]))
    return "\n\n".join(blocks)


def shown(group: Group, tokenizer: "PreTrainedTokenizerBase", coloured: bool) -> list[str]:
    """A line for the prompt and one for each completion, its tokens apart from each other."""
    prompt = "·".join(elided(pieces(tokenizer, group.prompt)))
    lines = [f"  {'prompt':<10}" + (f"{DIM}{prompt}{RESET}" if coloured else prompt)]
    for role, ids in group.completions.items():
        tokens = elided(pieces(tokenizer, ids))
        text = (f"{CYAN if role == 'KL' else GREEN}{'·'.join(tokens)}{RESET}" if coloured
                else "".join(f"[{token}]" for token in tokens))
        lines.append(f"  {role:<10}{text}")
    return lines


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Ids) -> list[str]:
    """The text that each id adds, special tokens and white space made visible.

    A character of several ids stands at the last of them, the others are `…`. An id that adds no text, as the blank
    that some tokenizers put in front, goes by its name in the vocabulary.
    """
    found, before = [], ""
    for end, name in enumerate(tokenizer.convert_ids_to_tokens(list(ids)), 1):
        decoded = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        text = decoded.rstrip("\ufffd")  # a character that is not complete yet
        found.append(visible(text[len(before):]) or ("…" if text != decoded else name))
        before = text
    return found


def visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def elided(tokens: list[str]) -> list[str]:
    """The tokens, with a count in the place of what is beyond LONGEST; both ends are kept."""
    half = LONGEST // 2
    if len(tokens) <= LONGEST:
        return tokens
    return [*tokens[:half], f"… {len(tokens) - 2 * half:,} more …", *tokens[-half:]]


def wants_colour() -> bool:
    """On a terminal, or where FORCE_COLOR is set; NO_COLOR wins."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def main() -> None:
    if not any(re.match(r"(\+*(config\.)?exp_name=|--config-path|-cp|--help|-h$)", word) for word in sys.argv[1:]):
        sys.argv.append("exp_name=preview")
    entry_point(run)()
