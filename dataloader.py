"""Data sets and loaders: a data set is one function from rows to Examples, a loader says only what a row of a batch is.

To add a data set, write `get_NAME(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix) -> Dataset`
here; `datasets=[NAME]` finds it. To add a loader, subclass `DataLoader` and name it in a loss's YAML.
"""

import inspect
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from groups import Group, cut_prompt, encode, starts_with_bos, with_mismatched
from sources import is_path, read_rows
from utils import REPOSITORY, UserError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


# Examples ------------------------------------------------------------------------------------------------------------

@dataclass
class Example:
    """One prompt, what was answered to it, and what people thought of the answers."""

    prompt: str = ""  # formatted: turns in their markers, ending with assistant_prefix
    generations: list[str] = field(default_factory=list)  # each ends in assistant_suffix
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices of generations
    scores: list[float] = field(default_factory=list)
    sft_index: int | None = None  # generation to imitate; None: the best, or the first
    desirable: list[bool | None] = field(default_factory=list)  # labels of unpaired data, by generation
    truncation_mode: str = "keep_end"  # which end of a long prompt survives
    dataset_name: str = ""
    original_prompt: str = ""  # unformatted, where it is a single instruction

    def num_generations(self) -> int:
        return len(self.generations)

    def sft_target(self) -> int | None:
        """Index of the generation to imitate: the one that is set, the best, or the first that is not known as bad."""
        if self.sft_index is not None:
            return self.sft_index
        if self.pairs:
            return self.pairs[0][0]
        if True in self.desirable:
            return self.desirable.index(True)
        labels = [*self.desirable, *[None] * (self.num_generations() - len(self.desirable))]
        return labels.index(None) if None in labels else None

    def remove_extra_spaces(self) -> None:
        """Two or more blanks or tabs become one blank; newlines and a lone tab stay."""
        self.prompt = fold_spaces(self.prompt)
        self.generations = [fold_spaces(text) for text in self.generations]

    def add_pair(self, better: str, worse: str) -> None:
        first = self.num_generations()
        self.generations += [better, worse]
        self.pairs.append((first, first + 1))

    def add_labelled(self, generation: str, label: bool) -> None:
        self.desirable += [None] * (self.num_generations() - len(self.desirable))
        self.generations.append(generation)
        self.desirable.append(label)


class Dataset(dict[str, Example]):
    """Examples by prompt; `data[prompt]` makes an empty one on first use."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.left_out: Counter[str] = Counter()  # why rows were left out -> how many

    def __missing__(self, prompt: str) -> Example:
        example = self[prompt] = Example(prompt=prompt, dataset_name=self.name)
        return example

    def merge(self, other: "Dataset") -> None:
        """Take over the other's examples; those of a prompt that both have are added to ours."""
        self.left_out.update(other.left_out)
        for prompt, theirs in other.items():
            if prompt not in self:
                self[prompt] = theirs
                continue
            ours, shift = self[prompt], self[prompt].num_generations()
            ours.sft_index = ours.sft_target()
            if ours.sft_index is None and (target := theirs.sft_target()) is not None:
                ours.sft_index = target + shift
            ours.desirable += [None] * (shift - len(ours.desirable))
            ours.generations += theirs.generations
            ours.pairs += [(better + shift, worse + shift) for better, worse in theirs.pairs]
            ours.scores += theirs.scores
            ours.desirable += theirs.desirable


def fold_spaces(text: str) -> str:
    return re.sub(r"[ \t]{2,}", " ", text)


class Markers(NamedTuple):
    """A turn is prefix + text + suffix of its speaker; a prompt ends with `assistant_prefix`."""

    human_prefix: str
    human_suffix: str
    assistant_prefix: str
    assistant_suffix: str

    def prompt(self, messages: Messages, place: str = "") -> str:
        """The turns before an answer. A system message is the beginning of the next human turn, or one by itself."""
        text, system = "", []
        for message in [*messages, {"role": "end", "content": ""}]:
            role, content = message["role"], message["content"]
            if role == "system":
                system.append(content)
                continue
            if role in ("user", "human") or system:
                said = [*system, content] if role in ("user", "human") else system
                text += self.human_prefix + "\n\n".join(said) + self.human_suffix
                system = []
            if role == "assistant":
                text += self.assistant_prefix + content + self.assistant_suffix
            elif role not in ("user", "human", "end"):
                raise UserError(f"{place}: role {role!r}, allowed are system, user and assistant")
        return text + self.assistant_prefix

    def answer(self, text: str) -> str:
        return text + self.assistant_suffix


# Data sets -----------------------------------------------------------------------------------------------------------

def get_demo(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str,
             assistant_suffix: str) -> Dataset:
    """The pairs in examples/demo, written for this project: everyday questions, a helpful and a poor answer to each."""
    return get_file(str(REPOSITORY / "examples/demo"), split,
                    Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix), name="demo")


def get_demo_judge(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str,
                   assistant_suffix: str) -> Dataset:
    """Pairs like those of `demo` that no policy is trained on: they train the demo's reward model."""
    return get_file(str(REPOSITORY / "examples/demo_judge"), split,
                    Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix), name="demo_judge")


def get_hh(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
           source: str = "Anthropic/hh-rlhf", data_dir: str | None = None, name: str = "hh") -> Dataset:
    """Anthropic's helpful and harmless dialogues (Bai et al., 2022): the whole of `Anthropic/hh-rlhf`.

    The prompt is the chosen transcript up to its last assistant marker, the answers follow it on each side. The first
    row's chosen answer is the SFT target. Rows without the marker, or whose two prompts differ, are left out.
    """
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset(name)
    for place, row in read_rows(source, split, data_dir=data_dir):
        for side in ("chosen", "rejected"):
            if not isinstance(row.get(side), str):
                raise UserError(f"{place}: {side!r} is {row.get(side)!r:.40}, where a transcript is needed, as in "
                                "Anthropic/hh-rlhf")
        before, marker, chosen = row["chosen"].rpartition(HH_ANSWER)
        rejected = row["rejected"].removeprefix(before + marker)
        if not marker:
            data.left_out["the chosen transcript has no '\\n\\nAssistant: '"] += 1
        elif rejected == row["rejected"] or HH_ANSWER in rejected:
            data.left_out["the prompts of the two sides differ"] += 1
        elif HH_QUESTION in chosen or HH_QUESTION in rejected:
            data.left_out["the last reply is missing: a human turn follows the last '\\n\\nAssistant: '"] += 1
        else:
            prompt = fold_spaces(markers.prompt(transcript_turns(before)))
            example = data[prompt]
            example.add_pair(markers.answer(fold_spaces(chosen)), markers.answer(fold_spaces(rejected)))
            example.sft_index = 0
    return data


def get_hh_helpful(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
                   source: str = "Anthropic/hh-rlhf") -> Dataset:
    """The helpful half: `helpful-base` of `Anthropic/hh-rlhf`."""
    return get_hh(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix, source=source,
                  data_dir="helpful-base", name="hh_helpful")


def get_hh_harmless(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
                    source: str = "Anthropic/hh-rlhf") -> Dataset:
    """The harmless half: `harmless-base` of `Anthropic/hh-rlhf`."""
    return get_hh(split, human_prefix, human_suffix, assistant_prefix, assistant_suffix, source=source,
                  data_dir="harmless-base", name="hh_harmless")


HH_ANSWER, HH_QUESTION = "\n\nAssistant: ", "\n\nHuman:"


def transcript_turns(transcript: str) -> Messages:
    """Turns of a `Human: … Assistant: …` transcript, split at either word and colon before white space."""
    parts = re.split(r"(Human|Assistant):(?=\s|$)", transcript)
    return [{"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
            for speaker, text in zip(parts[1::2], parts[2::2], strict=True)]


def get_file(source: str, split: str, markers: Markers, name: str | None = None) -> Dataset:
    """Rows of a file, a folder or the Hub in the shapes that `datasets` and TRL users have.

    Paired: chosen, rejected, with prompt or without (strings, or lists of messages). Unpaired: prompt, completion,
    label, or messages and label. SFT: prompt and completion, or messages. Prompts are cut at their start when long.
    """
    data = Dataset(name or source)
    for place, row in read_rows(source, split):
        if "chosen" in row or "rejected" in row:
            turns, (chosen, rejected) = _conversation(row, ("chosen", "rejected"), place)
            example = data[markers.prompt(turns, place)]
            example.add_pair(markers.answer(chosen), markers.answer(rejected))
        else:
            turns, (answer,) = _conversation(row, ("messages" if "messages" in row else "completion",), place)
            example = data[markers.prompt(turns, place)]
            if row.get("label") is None:
                example.sft_index = example.num_generations() if example.sft_index is None else example.sft_index
                example.generations.append(markers.answer(answer))
            else:
                example.add_labelled(markers.answer(answer), _label(row["label"], place))
        if len(turns) == 1:
            example.original_prompt = turns[0]["content"]
    return data


def _conversation(row: dict[str, Any], fields: Sequence[str], place: str) -> tuple[Messages, list[str]]:
    """The turns before the answer, and the answer in each of `fields`."""
    values = [_field(row, name, place) for name in fields]
    prompt = row.get("prompt")
    if all(isinstance(value, str) for value in values):
        if prompt is not None:
            return _messages(prompt, place), values
        before, marker, _ = values[0].rpartition(HH_ANSWER)
        answers = [value.removeprefix(before + marker) for value in values]
        if not marker or any(value == answer or HH_ANSWER in answer
                             for value, answer in zip(values, answers, strict=True)):
            raise UserError(f"{place}: no 'prompt', and {' and '.join(fields)} are no transcripts of one "
                            "'\\n\\nHuman: … \\n\\nAssistant: …' dialogue; add a prompt")
        return transcript_turns(before), answers
    conversations = [_messages(value, place) for value in values]
    for turns in conversations:
        if not turns or turns[-1]["role"] != "assistant":
            raise UserError(f"{place}: {' and '.join(fields)} must end with an assistant message")
    histories = [turns[:-1] for turns in conversations]
    if any(history != histories[0] for history in histories):
        raise UserError(f"{place}: the conversations in {' and '.join(fields)} differ before their last message")
    turns = histories[0]
    if prompt is not None and (not turns or turns[0]["role"] == "assistant"):  # else the answers bring their prompt
        turns = _messages(prompt, place) + turns
    return turns, [conversation[-1]["content"] for conversation in conversations]


def _field(row: dict[str, Any], name: str, place: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"{place}: no {name!r} (has {', '.join(map(repr, row))}); a row needs chosen and rejected, or "
                        "completion, or messages, and a prompt where those do not hold it")
    return row[name]


def _messages(value: Any, place: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value):
        raise UserError(f"{place}: got {str(value)[:60]!r}, where text or a list of {{role, content}} is needed")
    return value


def _label(value: Any, place: str) -> bool:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise UserError(f"{place}: label is {value!r}, allowed are true and false")


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
