"""Loaders: they say what a row of a batch is. Data sets by name: one function from rows to Examples each.

To add a data set, write `get_NAME(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix) -> Dataset`
here; `datasets=[NAME]` finds it. To add a loader, subclass `DataLoader` and name it in a loss's YAML.
"""

import inspect
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from corpora import get_demo, get_demo_judge, get_file, get_hh, get_hh_harmless, get_hh_helpful
from feedback import Dataset, Example, Markers, fold_spaces
from groups import Group, cut_prompt, encode, starts_with_bos, with_mismatched
from sources import is_path
from utils import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataLoader", "Dataset", "Example", "Markers", "fold_spaces", "get_demo", "get_demo_judge", "get_hh",
           "get_hh_harmless", "get_hh_helpful", "load_dataset", "make_loader"]


# Data sets by name ---------------------------------------------------------------------------------------------------

def load_dataset(name: str, split: str, markers: Markers) -> Dataset:
    """The data set called `name`: a `get_name` function here, a file or folder, or `name:path` for both."""
    getters: dict[str, Callable[..., Any]] = {
        key.removeprefix("get_"): value for key, value in globals().items()
        if key.startswith("get_") and callable(value) and key != "get_file"}
    base, _, path = name.partition(":")
    if base in getters and path:
        if "source" not in inspect.signature(getters[base]).parameters:
            raise UserError(f"datasets: {base} does not read from a path ({path}): get_{base} takes no source")
        return getters[base](split, *markers, source=path)
    if base in getters:
        return getters[base](split, *markers)
    if is_path(name):
        return get_file(name, split, markers)
    raise UserError(f"datasets: no dataset {name!r} (have {', '.join(sorted(getters))}){nearest(name, getters)}; add "
                    f"get_{re.sub(r'[^0-9A-Za-z_]', '_', name)} to dataloader.py, or give a file's path")


def load_datasets(config: "DictConfig", split: str) -> Dataset:
    """All of `config.datasets`, merged by prompt; what was left out is said."""
    markers = Markers(config.human_prefix, config.human_suffix, config.assistant_prefix, config.assistant_suffix)
    data = Dataset("+".join(config.datasets))
    for name in config.datasets:
        data.merge(load_dataset(name, split, markers))
    if data.left_out:
        print(f"note: {split}: left out {data.left_out.total():,} rows: "
              + "; ".join(f"{count:,} because {why}" for why, count in data.left_out.items()), file=sys.stderr)
    return data


# Loaders -------------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """What a row of a batch is: generations of one example by their role (chosen, rejected), not yet tokenised."""

    number: int  # of the example
    roles: dict[str, int]  # role -> index of the generation
    pair: int = -1  # index of the pair that it belongs to
    control: str = ""  # a token of the vocabulary that stands at the end of the prompt


class DataLoader:
    """Batches of Groups, in an order that the seed fixes. A subclass says what a row is.

    Owns shuffling, epochs, `n_examples`, limits and KL pairs. Iterating yields lists of `Group`s: `batch_size` rows
    each, the last of an epoch fewer. `len()` is the number of rows over all epochs.
    """

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        """The rows of (number, example) pairs, which come in shuffled order."""
        raise NotImplementedError

    def order(self, rows: list[Row], epoch: int) -> list[Row]:
        """The rows as this epoch trains on them. An evaluation keeps the order of `rows`, and so pairs together."""
        return self.generator(epoch).sample(rows, len(rows)) if self.split == "train" else rows

    def generator(self, *stream: object) -> random.Random:
        """Random numbers that depend on the seed, the split and `stream` alone."""
        return random.Random("/".join(map(str, (self.config.seed, self.split, *stream))))

    def __init__(self, config: "DictConfig", tokenizer: "PreTrainedTokenizerBase", split: str = "train", *,
                 with_KL: bool = False, data: Dataset | None = None) -> None:
        self.config, self.tokenizer, self.split, self.with_KL = config, tokenizer, split, with_KL
        training = split == "train"
        self.batch_size = config.model.batch_size if training else config.model.eval_batch_size
        self.n_examples = config.n_examples if training else config.n_eval_examples
        self.n_epochs = config.n_epochs if training else 1
        if with_KL and self.batch_size < 2:
            key = "model.batch_size" if training else "model.eval_batch_size"
            raise UserError(f"{key}: got {self.batch_size}, allowed is 2 or more: this loss estimates its KL reference "
                            "point on another example of the batch")
        self.examples = list((load_datasets(config, split) if data is None else data).values())
        examples = list(enumerate(self.examples))
        self.generator("prompts").shuffle(examples)
        self._rows = self._usable(list(self.rows(examples)))
        if with_KL and min(len(self), len(self._rows)) < 2:
            raise UserError(f"datasets: a single {split} row is too few: this loss estimates its KL reference point on "
                            "another example of the batch")
        if training and self.n_examples and self.n_epochs and len(self) < self.n_examples:
            print(f"note: n_epochs={self.n_epochs} ends after {len(self):,} examples, before n_examples="
                  f"{self.n_examples:,}; ++n_epochs=null goes on", file=sys.stderr)

    def __len__(self) -> int:
        ends = [end for end in (self.n_epochs and self.n_epochs * len(self._rows), self.n_examples) if end]
        return min(ends or [len(self._rows)])

    def __iter__(self) -> Iterator[list[Group]]:
        for rows in self._batches():
            groups = [self.group(row) for row in rows]
            yield with_mismatched(groups, self.config.model.max_length) if self.with_KL else groups

    def _batches(self) -> Iterator[list[Row]]:
        """Where KL pairs are formed, a batch of a single row joins the one before it."""
        left, epoch, held = len(self), 0, list[Row]()
        while left:
            rows = self.order(self._rows, epoch)[:left]
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start:start + self.batch_size]
                if self.with_KL and len(batch) == 1:
                    held = held + batch
                    continue
                if held:
                    yield held
                held = batch
            left, epoch = left - len(rows), epoch + 1
        yield held

    def _usable(self, rows: list[Row]) -> list[Row]:
        """Tokenise what the rows name, once, and leave out (counted, said) the rows that cannot be scored."""
        texts = list(dict.fromkeys((row.number, index) for row in rows for index in row.roles.values()))
        encoded = encode(self.tokenizer, [self.examples[number].prompt for number, _ in texts],
                         [self.examples[number].generations[index] for number, index in texts])
        self._prompts = {number: prompt for (number, _), (prompt, _) in zip(texts, encoded, strict=True)}
        self._completions = {text: completion for text, (_, completion) in zip(texts, encoded, strict=True)}
        self._bos = int(starts_with_bos(self.tokenizer))
        usable, left_out = [], Counter[str]()
        for row in rows:
            if obstacle := self._obstacle(row):
                left_out[obstacle] += 1
            else:
                usable.append(row)
        reasons = "; ".join(f"{count:,} {why}" for why, count in left_out.items())
        names = ", ".join(self.config.datasets)
        if not usable:
            raise UserError(f"datasets: {names}: no {self.split} row for {type(self).__name__}"
                            + (f" (left out: {reasons})" if reasons else ""))
        if left_out:
            print(f"note: {names}: left out {left_out.total():,} of {len(rows):,} {self.split} rows: {reasons}",
                  file=sys.stderr)
        return usable

    def _obstacle(self, row: Row) -> str:
        group = self.group(row)
        if not group.prompt:
            return "with an empty prompt, after which no first token can be predicted"
        if not all(group.completions.values()):
            return f"whose prompt leaves no room for a completion in model.max_length={self.config.model.max_length}"
        return ""

    def group(self, row: Row) -> Group:
        """The row's ids, cut to the limits. The prompt is cut once, if any of the row's own completions demands it."""
        model, example = self.config.model, self.examples[row.number]
        completions = {role: self._completions[row.number, index] for role, index in row.roles.items()}
        control: list[Any] = [self.tokenizer.convert_tokens_to_ids(row.control)] if row.control else []
        prompt = cut_prompt(self._prompts[row.number] + control, max(map(len, completions.values())),
                            model.max_length, model.max_prompt_length, example.truncation_mode,
                            head=self._bos, tail=len(control))
        room = max(model.max_length - len(prompt), 0)
        return Group(prompt, {role: ids[:room] for role, ids in completions.items()}, row.number, row.pair)


class SFTDataLoader(DataLoader):
    """One row a prompt: its SFT target."""

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        for number, example in examples:
            if (target := example.sft_target()) is not None:
                yield Row(number, {"chosen": target})


class PairedPreferenceDataLoader(DataLoader):
    """One row a pair: its better and its worse generation."""

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        for number, example in examples:
            for pair, (better, worse) in enumerate(example.pairs):
                yield Row(number, {"chosen": better, "rejected": worse}, pair)


class UnpairedPreferenceDataLoader(DataLoader):
    """Two rows a pair, the better generation as chosen and the worse as rejected; one row a labelled generation.

    `frac_unique_desirable` and `frac_unique_undesirable` keep the first rows of their class, in shuffled prompt order.
    """

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        every = [row for number, example in examples for row in self.unpaired(number, example)]
        fractions = {"chosen": self.config.frac_unique_desirable, "rejected": self.config.frac_unique_undesirable}
        total = Counter(next(iter(row.roles)) for row in every)
        # Rounded, since 100 * 0.07 is a little more than 7.
        left = {role: math.ceil(round(total[role] * fractions[role], 6)) if self.split == "train" else total[role]
                for role in fractions}
        for row in every:
            role = next(iter(row.roles))
            left[role] -= 1
            if left[role] >= 0:
                yield row

    def unpaired(self, number: int, example: Example) -> Iterator[Row]:
        for pair, (better, worse) in enumerate(example.pairs):
            yield Row(number, {"chosen": better}, pair)
            yield Row(number, {"rejected": worse}, pair)
        for index, label in enumerate(example.desirable):
            if label is not None:
                yield Row(number, {"chosen" if label else "rejected": index})


def make_loader(config: "DictConfig", tokenizer: "PreTrainedTokenizerBase", split: str, *,
                with_KL: bool = False) -> DataLoader:
    """The loader that the loss's YAML names."""
    loaders = {name: value for name, value in globals().items()
               if isinstance(value, type) and issubclass(value, DataLoader)}
    name = config.loss.dataloader
    if name not in loaders:
        raise UserError(f"loss.dataloader: no loader {name!r} in dataloader.py (have {', '.join(loaders)})"
                        f"{nearest(str(name), loaders)}")
    return loaders[name](config, tokenizer, split, with_KL=with_KL)
