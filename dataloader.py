"""Loaders: they say what a row of a batch is. Data sets by name: one function from rows to Examples each.

To add a data set, write `get_NAME(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix) -> Dataset`
here; `datasets=[NAME]` finds it. To add a loader, subclass `DataLoader` and name it in a loss's YAML.
"""

import contextlib
import gc
import hashlib
import inspect
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batches import DataLoader
from corpora import (
    OF_THEIR_SOURCE,
    get_alpacaeval,
    get_demo,
    get_demo_judge,
    get_hh,
    get_hh_harmless,
    get_hh_helpful,
    get_oasst,
    get_shp,
    get_ultrabin,
    get_ultrachat,
)
from feedback import Dataset, Example, Markers, fold_spaces
from rows import Row, RowTable
from shapes import RULE_OPTIONS, get_file
from sources import HUB, HUB_OPTIONS, data_files, is_path, note, notes, with_options
from token_store import Given, TokenStore, key_of, recalled, remember, tokenised
from utils import UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase


# Data sets by name ---------------------------------------------------------------------------------------------------

def load_dataset(name: str, split: str, markers: Markers, seed: int = 0) -> Dataset:
    """The data set called `name`: a `get_name` function here, a file or folder, `name:path` for both, or `hf:org/name`.

    Options may follow: `shp?fraction=0.1`, `scored.jsonl?pairs=all&fraction=0.1`. seed: of a fraction's choice.
    """
    source, options = with_options(name)
    fraction = _fraction(name, options.pop("fraction", "1"))
    data = _load_whole(source, split, markers, options)
    return _part(data, fraction, markers, seed) if split == "train" and fraction < 1 else data


def _load_whole(name: str, split: str, markers: Markers, options: dict[str, str]) -> Dataset:
    getters = _getters()
    base, _, path = name.partition(":")
    if name.startswith(HUB):
        _require_options(name, options, *RULE_OPTIONS, *HUB_OPTIONS)
        return get_file(name, split, markers, options=options)
    if base in getters:
        _require_options(name, options)
        if path and "source" not in inspect.signature(getters[base]).parameters:
            raise UserError(f"datasets: {base} does not read from a path ({path}): get_{base} takes no source")
        return getters[base](split, *markers, **{"source": path} if path else {})
    if is_path(name):
        _require_options(name, options, *RULE_OPTIONS)
        return get_file(name, split, markers, options=options)
    raise UserError(f"datasets: no dataset {name!r} (have {', '.join(sorted(getters))}){nearest(name, getters)}; add "
                    f"get_{re.sub(r'[^0-9A-Za-z_]', '_', name)} to dataloader.py, or give a file's path, or "
                    f"{HUB}{name} for a set on the Hub")


def _getters() -> dict[str, Callable[..., Any]]:
    return {key.removeprefix("get_"): value for key, value in globals().items()
            if key.startswith("get_") and callable(value) and key != "get_file"}


def _require_options(name: str, options: dict[str, str], *allowed: str) -> None:
    known = ("fraction", *allowed)
    for key in options:
        if key not in known:
            raise UserError(f"datasets: {name} has no option {key!r}, allowed are {', '.join(known)}"
                            f"{nearest(key, known)} ({', '.join(RULE_OPTIONS)} are for files and {HUB} names, "
                            f"{', '.join(HUB_OPTIONS)} for {HUB} names)")


def _fraction(name: str, value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise UserError(f"datasets: {name}: fraction is {value!r}, allowed is a number above 0 and at most 1")
    return fraction


def _part(data: Dataset, fraction: float, markers: Markers, seed: int) -> Dataset:
    """A fraction of the prompts, rounded up: those whose text has the lowest hashes.

    So neither the order of the rows, nor the other data sets, nor the markers change the choice.
    """
    def rank(prompt: str) -> bytes:
        for marker in filter(str.strip, markers):
            prompt = prompt.replace(marker, " ")
        return hashlib.sha256(f"{seed} {' '.join(prompt.split())}".encode()).digest()

    ranks = list(map(rank, data))
    # Rounded, since 100 * 0.07 is a little more than 7.
    part = data.part(sorted(range(len(data)), key=ranks.__getitem__)[:math.ceil(round(fraction * len(data), 6))])
    note(f"note: {data.name}: {len(part):,} of {len(data):,} training prompts, as fraction={fraction:g} asks")
    return part


def load_datasets(config: "DictConfig", split: str) -> Dataset:
    """All of `config.datasets`, merged by prompt; what was left out is said."""
    markers = Markers.from_config(config)
    data = Dataset("+".join(config.datasets))
    for name in config.datasets:
        data.merge(load_dataset(name, split, markers, config.seed))
    if data.left_out:
        note(f"note: {split}: left out {data.left_out.total():,} rows or pairs: "
             + "; ".join(f"{count:,} because {why}" for why, count in data.left_out.items()))
    return data


def load_tokenised(config: "DictConfig", tokenizer: "PreTrainedTokenizerBase", split: str
                   ) -> tuple[TokenStore, Counter[str]]:
    """The data sets of a run with their token ids, and why rows were left out.

    Files whose rows were tokenised before are not even parsed; what a function of the user gives is tokenised once.
    """
    folder, markers = Path(config.cache_dir).expanduser() / "tokens", Markers.from_config(config)

    def key() -> str | None:
        files = [_files_read(name) for name in config.datasets]
        known = [file for each in files if each for file in each]
        return key_of(config.datasets, known, split, markers, config.seed) if all(files) else None

    before = key()
    if before and (found := recalled(folder, before, tokenizer)):
        return found[0], Counter(found[1].left_out)
    with notes() as said:
        data = load_datasets(config, split)
    store = tokenised(data, tokenizer, folder)
    if before and store.kept and before == key():  # or else a file was changed while it was read
        remember(folder, before, Given(store.content, data.left_out, said))
    return store, data.left_out


def _files_read(name: str) -> list[Path] | None:
    """The files that decide about what `name` gives, with the code. None: nobody knows what else does."""
    source, _ = with_options(name)
    base, _, path = source.partition(":")
    if source.startswith(HUB) or (base in _getters() and _getters()[base] not in OF_THEIR_SOURCE):
        return None
    if base in _getters():
        return data_files(path) if is_path(path) else None
    return data_files(source) if is_path(source) else None


# Loaders -------------------------------------------------------------------------------------------------------------

class SFTDataLoader(DataLoader):
    """One row a prompt: its SFT target."""

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        for number, example in examples:
            if (target := example.sft_target()) is not None:
                yield Row(number, {"chosen": target})


class PairedPreferenceDataLoader(DataLoader):
    """One row a pair: its better and its worse generation."""

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        for number, example in examples:
            for pair, (better, worse) in enumerate(example.pairs):
                yield Row(number, {"chosen": better, "rejected": worse}, pair)


class UnpairedPreferenceDataLoader(DataLoader):
    """Two rows a pair, the better generation as chosen and the worse as rejected; one row a labelled generation.

    `frac_unique_desirable` and `frac_unique_undesirable` keep the first rows of their class, in shuffled prompt order.
    """

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        repeated = dict[tuple[int, int], int]()  # (number, index of a text that was there before) -> index of the first

        def every() -> Iterator[Row]:
            for number, example in examples:
                if len(set(example.generations)) < len(example.generations):
                    repeated.update({(number, index): example.generations.index(text)
                                     for index, text in enumerate(example.generations)})
                yield from self.unpaired(number, example)

        rows = self.keep_fractions(every())
        self.say_contradictions(rows, repeated)
        return rows

    def unpaired(self, number: int, example: Example) -> Iterator[Row]:
        for pair, (better, worse) in enumerate(example.pairs):
            yield Row(number, {"chosen": better}, pair)
            yield Row(number, {"rejected": worse}, pair)
        for index, label in enumerate(example.desirable):
            if label is not None:
                yield Row(number, {"chosen" if label else "rejected": index})

    def keep_fractions(self, every: Iterable[Row]) -> RowTable:
        """Rows of one generation each, without those beyond their class's fraction; an evaluation keeps all."""
        rows = RowTable.of(every)
        if self.split != "train":
            return rows
        kept = np.ones(len(rows), bool)
        for role, fraction in (("chosen", self.config.frac_unique_desirable),
                               ("rejected", self.config.frac_unique_undesirable)):
            mine = rows.of_class(role)
            # Rounded, since 100 * 0.07 is a little more than 7.
            kept &= ~mine | (np.cumsum(mine) <= math.ceil(round(int(mine.sum()) * fraction, 6)))
        return rows.take(kept)

    def say_contradictions(self, rows: RowTable, repeated: dict[tuple[int, int], int]) -> None:
        """Say how many completions are chosen in one row and rejected in another: the same text after one prompt."""
        if not len(rows):
            return
        texts = np.stack([rows.numbers, rows.indices[:, 0]], axis=1)
        for place in np.flatnonzero(np.isin(rows.numbers, [number for number, _ in repeated])):
            texts[place, 1] = repeated[texts[place, 0], texts[place, 1]]
        different, text = np.unique(texts, axis=0, return_inverse=True)
        chosen = rows.of_class("chosen")
        both = len(np.intersect1d(text[chosen], text[~chosen]))
        if both:
            print(f"note: {', '.join(self.config.datasets)}: {both:,} of {len(different):,} {self.split} completions "
                  f"({both / len(different):.1%}) are chosen in one row and rejected in another", file=sys.stderr)


def class_of(row: Row) -> str:
    """The role of a row of one generation: chosen or rejected."""
    return next(iter(row.roles))


class ConditionalSFTDataLoader(UnpairedPreferenceDataLoader):
    """The rows of `UnpairedPreferenceDataLoader`, all imitated, each after the control token of its class.

    The token is the last id of the prompt: conditioned on, never scored. Every generation has the role chosen, so
    that `SFTTrainer` trains on it (Korbak et al., 2023, conditional training).
    """

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        tokens = {role: self.control_token(f"{role}_control_token") for role in ("chosen", "rejected")}
        if tokens["chosen"] == tokens["rejected"]:
            raise UserError(f"loss.rejected_control_token: got {tokens['rejected']!r}, which is the chosen one, too; "
                            "give each class a token of its own")
        for row in super().rows(examples):
            [(role, index)] = row.roles.items()
            yield row._replace(roles={"chosen": index}, control=tokens[role])

    def control_token(self, key: str) -> str:
        token = self.config.loss[key]
        if not token:
            raise UserError(f"loss.{key}: got {token!r}, allowed is a token such as <|good|>: {type(self).__name__} "
                            f"ends each prompt with the one of its class; set it in config/loss/, or by ++loss.{key}=")
        return token


class PrefUnaryDataLoader(UnpairedPreferenceDataLoader):
    """One row a prompt, from its first pair: its better generation as chosen or its worse as rejected.

    Chosen and rejected come in turn over the shuffled prompts; those without a pair have no row.
    """

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        pairs = ((number, *example.pairs[0]) for number, example in examples if example.pairs)
        return self.keep_fractions(
            Row(number, {"rejected": worse} if place % 2 else {"chosen": better}, pair=0)
            for place, (number, better, worse) in enumerate(pairs))


class ScoreUnaryDataLoader(UnpairedPreferenceDataLoader):
    """One row a prompt: its best generation by score as chosen or its worst as rejected (`ranked` says which is which).

    Chosen and rejected come in turn over the shuffled prompts; those without scores, or with equal ones, have no row.
    """

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        apart = ((number, scores) for number, scores in ranked(examples) if len(set(scores.values())) > 1)
        return self.keep_fractions(
            Row(number, {"rejected": min(scores, key=scores.__getitem__)} if place % 2 else
                {"chosen": max(scores, key=scores.__getitem__)})
            for place, (number, scores) in enumerate(apart))


class ScoreDataLoader(DataLoader):
    """One row a pair that the scores imply: any two generations of a prompt with different scores, the better chosen.

    `Example.pairs` says only which way the scores go (see `ranked`); ties make no pair.
    """

    def rows(self, examples: Sequence[tuple[int, Example]]) -> Iterable[Row]:
        for number, scores in ranked(examples):
            pairs = [(better, worse) for better, worse in permutations(scores, 2) if scores[better] > scores[worse]]
            for pair, (better, worse) in enumerate(pairs):
                yield Row(number, {"chosen": better, "rejected": worse}, pair)


def ranked(examples: Sequence[tuple[int, Example]]) -> Iterator[tuple[int, dict[int, float]]]:
    """(number, generation -> its score, higher is better) of each example, for the generations that have a score.

    Scores are turned round for a data set in which the better of a pair mostly has the lower one, as where they are
    ranks; a data set without pairs is taken to score upwards.
    """
    upwards = Counter[str]()
    for _, example in examples:
        scores = known_scores(example)
        for better, worse in example.pairs:
            if better in scores and worse in scores:
                upwards[example.dataset_name] += ((scores[better] > scores[worse]) - (scores[better] < scores[worse]))
    for number, example in examples:
        yield number, {index: -score if upwards[example.dataset_name] < 0 else score
                       for index, score in known_scores(example).items()}


def known_scores(example: Example) -> dict[int, float]:
    return {index: score for index, score in enumerate(example.scores) if not math.isnan(score)}


class SimpleKTODataLoader(UnpairedPreferenceDataLoader):
    """The rows of `UnpairedPreferenceDataLoader`, chosen and rejected in turn: as many of each in a batch.

    What one class has more than the other comes at the end of the epoch, in batches without the other.
    """

    def order(self, rows: Sequence[Row], epoch: int) -> Sequence[Row]:
        ordered = RowTable.of(super().order(rows, epoch))
        chosen, rejected = (np.flatnonzero(ordered.of_class(role)) for role in ("chosen", "rejected"))
        both = min(len(chosen), len(rejected))
        in_turn = np.stack([chosen[:both], rejected[:both]], axis=1).flatten()
        return ordered.take(np.concatenate([in_turn, chosen[both:], rejected[both:]]))


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


if __name__ == "__main__":
    from preview import main

    main()
