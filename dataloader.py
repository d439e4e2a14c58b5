"""Loaders: they say what a row of a batch is. Data sets by name: one function from rows to Examples each.

To add a data set, write `get_NAME(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix) -> Dataset`
here; `datasets=[NAME]` finds it. To add a loader, subclass `DataLoader` and name it in a loss's YAML.
"""

import hashlib
import inspect
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

from corpora import (
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
from groups import Group, cut_prompt, encode, starts_with_bos, with_mismatched
from shapes import RULE_OPTIONS, get_file
from sources import HUB, HUB_OPTIONS, is_path, with_options
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
    getters: dict[str, Callable[..., Any]] = {
        key.removeprefix("get_"): value for key, value in globals().items()
        if key.startswith("get_") and callable(value) and key != "get_file"}
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

    # Rounded, since 100 * 0.07 is a little more than 7.
    kept = set(sorted(data, key=rank)[:math.ceil(round(fraction * len(data), 6))])
    part = Dataset(data.name)
    part.left_out = data.left_out
    part.update((prompt, example) for prompt, example in data.items() if prompt in kept)
    print(f"note: {data.name}: {len(part):,} of {len(data):,} training prompts, as fraction={fraction:g} asks",
          file=sys.stderr)
    return part


def load_datasets(config: "DictConfig", split: str) -> Dataset:
    """All of `config.datasets`, merged by prompt; what was left out is said."""
    markers = Markers.from_config(config)
    data = Dataset("+".join(config.datasets))
    for name in config.datasets:
        data.merge(load_dataset(name, split, markers, config.seed))
    if data.left_out:
        print(f"note: {split}: left out {data.left_out.total():,} rows or pairs: "
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
        data = load_datasets(config, split) if data is None else data
        self.examples = list(data.values())
        self.left_out = Counter(data.left_out)  # why rows were left out, by the data set or here -> how many
        examples = list(enumerate(self.examples))
        self.generator("prompts").shuffle(examples)
        self.epoch_rows = self._usable(list(self.rows(examples)))
        if with_KL and min(len(self), len(self.epoch_rows)) < 2:
            raise UserError(f"datasets: a single {split} row is too few: this loss estimates its KL reference point on "
                            "another example of the batch")
        if training and self.n_examples and self.n_epochs and len(self) < self.n_examples:
            print(f"note: n_epochs={self.n_epochs} ends after {len(self):,} examples, before n_examples="
                  f"{self.n_examples:,}; ++n_epochs=null goes on", file=sys.stderr)

    def __len__(self) -> int:
        ends = [end for end in (self.n_epochs and self.n_epochs * len(self.epoch_rows), self.n_examples) if end]
        return min(ends or [len(self.epoch_rows)])

    def __iter__(self) -> Iterator[list[Group]]:
        for rows in self._batches():
            groups = [self.group(row) for row in rows]
            yield with_mismatched(groups, self.config.model.max_length) if self.with_KL else groups

    def _batches(self) -> Iterator[list[Row]]:
        """Where KL pairs are formed, a batch of a single row joins the one before it."""
        left, epoch, held = len(self), 0, list[Row]()
        while left:
            rows = self.order(self.epoch_rows, epoch)[:left]
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
        """The rows that can be scored; what is left out is counted and said."""
        self._tokenise(rows)
        usable, left_out = [], Counter[str]()
        for row in rows:
            if obstacle := self._obstacle(row):
                left_out[obstacle] += 1
            else:
                usable.append(row)
        name, names = type(self).__name__, ", ".join(self.config.datasets)
        reasons = "; ".join(f"{count:,} {why}" for why, count in left_out.items())
        if not usable:
            raise UserError(f"datasets: {names}: no {self.split} row for {name}"
                            + (f" (left out: {reasons})" if reasons else ""))
        if left_out:
            print(f"note: {names}: left out {left_out.total():,} of {len(rows):,} {self.split} rows: {reasons}",
                  file=sys.stderr)
        if without := len(self.examples) - len({row.number for row in rows}):
            print(f"note: {names}: {without:,} of {len(self.examples):,} {self.split} prompts have no row for {name}",
                  file=sys.stderr)
            left_out[f"prompts without a row for {name}"] = without
        self.left_out.update(left_out)
        return usable

    def _tokenise(self, rows: list[Row]) -> None:
        """Encode what the rows name, each text once."""
        texts = list(dict.fromkeys((row.number, index) for row in rows for index in row.roles.values()))
        encoded = encode(self.tokenizer, [self.examples[number].prompt for number, _ in texts],
                         [self.examples[number].generations[index] for number, index in texts])
        self.prompt_ids = {number: prompt for (number, _), (prompt, _) in zip(texts, encoded, strict=True)}
        self.completion_ids = {text: completion for text, (_, completion) in zip(texts, encoded, strict=True)}
        self._bos = int(starts_with_bos(self.tokenizer))

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
        completions = {role: self.completion_ids[row.number, index] for role, index in row.roles.items()}
        control = [control_id(self.tokenizer, row.control)] if row.control else []
        prompt = cut_prompt(self.prompt_ids[row.number] + control, max(map(len, completions.values())),
                            model.max_length, model.max_prompt_length, example.truncation_mode,
                            head=self._bos, tail=len(control))
        room = max(model.max_length - len(prompt), 0)
        return Group(prompt, {role: ids[:room] for role, ids in completions.items()}, row.number, row.pair,
                     example.weight(next(iter(row.roles.values()))))


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
        rows = self.keep_fractions([row for number, example in examples for row in self.unpaired(number, example)])
        self.say_contradictions(rows)
        return iter(rows)

    def unpaired(self, number: int, example: Example) -> Iterator[Row]:
        for pair, (better, worse) in enumerate(example.pairs):
            yield Row(number, {"chosen": better}, pair)
            yield Row(number, {"rejected": worse}, pair)
        for index, label in enumerate(example.desirable):
            if label is not None:
                yield Row(number, {"chosen" if label else "rejected": index})

    def keep_fractions(self, every: list[Row]) -> list[Row]:
        """Rows of one generation each, without those beyond their class's fraction; an evaluation keeps all."""
        fractions = {"chosen": self.config.frac_unique_desirable, "rejected": self.config.frac_unique_undesirable}
        total = Counter(map(class_of, every))
        # Rounded, since 100 * 0.07 is a little more than 7.
        left = {role: math.ceil(round(total[role] * fractions[role], 6)) if self.split == "train" else total[role]
                for role in fractions}
        kept = []
        for row in every:
            left[class_of(row)] -= 1
            if left[class_of(row)] >= 0:
                kept.append(row)
        return kept

    def say_contradictions(self, rows: list[Row]) -> None:
        """Say how many completions are chosen in one row and rejected in another: the same text after one prompt."""
        classes = dict[tuple[int, str], set[str]]()
        for row in rows:
            [(role, index)] = row.roles.items()
            classes.setdefault((row.number, self.examples[row.number].generations[index]), set()).add(role)
        both = sum(len(found) == 2 for found in classes.values())
        if both:
            print(f"note: {', '.join(self.config.datasets)}: {both:,} of {len(classes):,} {self.split} completions "
                  f"({both / len(classes):.1%}) are chosen in one row and rejected in another", file=sys.stderr)


def class_of(row: Row) -> str:
    """The role of a row of one generation: chosen or rejected."""
    return next(iter(row.roles))


class ConditionalSFTDataLoader(UnpairedPreferenceDataLoader):
    """The rows of `UnpairedPreferenceDataLoader`, all imitated, each after the control token of its class.

    The token is the last id of the prompt: conditioned on, never scored. Every generation has the role chosen, so
    that `SFTTrainer` trains on it (Korbak et al., 2023, conditional training).
    """

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
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

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        pairs = [(number, *example.pairs[0]) for number, example in examples if example.pairs]
        return iter(self.keep_fractions([
            Row(number, {"rejected": worse} if place % 2 else {"chosen": better}, pair=0)
            for place, (number, better, worse) in enumerate(pairs)]))


class ScoreUnaryDataLoader(UnpairedPreferenceDataLoader):
    """One row a prompt: its best generation by score as chosen or its worst as rejected (`ranked` says which is which).

    Chosen and rejected come in turn over the shuffled prompts; those without scores, or with equal ones, have no row.
    """

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        apart = [(number, scores) for number, scores in ranked(examples) if len(set(scores.values())) > 1]
        return iter(self.keep_fractions([
            Row(number, {"rejected": min(scores, key=scores.__getitem__)} if place % 2 else
                {"chosen": max(scores, key=scores.__getitem__)})
            for place, (number, scores) in enumerate(apart)]))


class ScoreDataLoader(DataLoader):
    """One row a pair that the scores imply: any two generations of a prompt with different scores, the better chosen.

    `Example.pairs` says only which way the scores go (see `ranked`); ties make no pair.
    """

    def rows(self, examples: list[tuple[int, Example]]) -> Iterator[Row]:
        for number, scores in ranked(examples):
            pairs = [(better, worse) for better, worse in permutations(scores, 2) if scores[better] > scores[worse]]
            for pair, (better, worse) in enumerate(pairs):
                yield Row(number, {"chosen": better, "rejected": worse}, pair)


def ranked(examples: list[tuple[int, Example]]) -> list[tuple[int, dict[int, float]]]:
    """(number, generation -> its score, higher is better) of each example, for the generations that have a score.

    Scores are turned round for a data set in which the better of a pair mostly has the lower one, as where they are
    ranks; a data set without pairs is taken to score upwards.
    """
    scored = [(number, example, {index: score for index, score in enumerate(example.scores) if not math.isnan(score)})
              for number, example in examples]
    upwards = Counter[str]()
    for _, example, scores in scored:
        for better, worse in example.pairs:
            if better in scores and worse in scores:
                upwards[example.dataset_name] += ((scores[better] > scores[worse]) - (scores[better] < scores[worse]))
    return [(number, {index: -score if upwards[example.dataset_name] < 0 else score
                      for index, score in scores.items()}) for number, example, scores in scored]


class SimpleKTODataLoader(UnpairedPreferenceDataLoader):
    """The rows of `UnpairedPreferenceDataLoader`, chosen and rejected in turn: as many of each in a batch.

    What one class has more than the other comes at the end of the epoch, in batches without the other.
    """

    def order(self, rows: list[Row], epoch: int) -> list[Row]:
        ordered = super().order(rows, epoch)
        chosen, rejected = ([row for row in ordered if class_of(row) == role] for role in ("chosen", "rejected"))
        both = min(len(chosen), len(rejected))
        return [row for pair in zip(chosen, rejected, strict=False) for row in pair] + chosen[both:] + rejected[both:]


def control_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """The id of a control token. Errors: `UserError` where the tokenizer does not have it as one token."""
    found: Any = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise UserError(f"control token {token!r}: the tokenizer has no such token; name it in "
                        "loss.chosen_control_token or loss.rejected_control_token, which are added to it")
    return found


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
