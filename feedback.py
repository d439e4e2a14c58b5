"""What a data set holds: a prompt, what was answered to it, and what people thought of the answers."""

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, ValuesView
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from records import Records
from utils import UserError

Messages = list[dict[str, str]]
OPEN = 8192  # examples of a data set that are objects in memory; the others are on disk


@dataclass(slots=True)
class Example:
    """One prompt, what was answered to it, and what people thought of the answers.

    `desirable`, `scores` and `weights` run parallel to `generations`; each may be shorter, and what it lacks is unknown
    (a weight: 1).
    """

    prompt: str = ""  # formatted: turns in their markers, ending with assistant_prefix
    generations: list[str] = field(default_factory=list)  # each ends in assistant_suffix
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (better, worse), indices of generations
    scores: list[float] = field(default_factory=list)  # higher is better (oasst: ranks, lower is); NaN: none
    sft_index: int | None = None  # generation to imitate; None: the best, or the first
    desirable: list[bool | None] = field(default_factory=list)  # labels of unpaired data
    truncation_mode: str = "keep_end"  # which end of a long prompt survives
    dataset_name: str = ""
    original_prompt: str = ""  # unformatted, where it is a single instruction
    weights: list[float] = field(default_factory=list)  # how much a generation counts in the loss

    def num_generations(self) -> int:
        return len(self.generations)

    def weight(self, index: int) -> float:
        """How much a generation counts; a pair counts as much as its better one."""
        return self.weights[index] if index < len(self.weights) else 1.0

    def sft_target(self) -> int | None:
        """Index of the generation to imitate: the one that is set, the best, or the first that is not known as bad."""
        if self.sft_index is not None:
            return self.sft_index
        if self.pairs:
            return self.pairs[0][0]
        if True in self.desirable:
            return self.desirable.index(True)
        labels = [*self.desirable, *[None] * (self.num_generations() - len(self.desirable))]
        free = [index for index, label in enumerate(labels) if label is None]
        scored = [index for index in free if index < len(self.scores) and not math.isnan(self.scores[index])]
        return max(scored, key=self.scores.__getitem__) if scored else free[0] if free else None

    def remove_extra_spaces(self) -> None:
        """Two or more blanks or tabs become one blank; newlines and a lone tab stay."""
        self.prompt = fold_spaces(self.prompt)
        self.generations = [fold_spaces(text) for text in self.generations]

    def add(self, generation: str, *, label: bool | None = None, score: float | None = None,
            weight: float = 1.0) -> int:
        """Add a generation; its index is returned."""
        index = self.num_generations()
        self.generations.append(generation)
        _extend(self.desirable, index, [] if label is None else [label], None)
        _extend(self.scores, index, [] if score is None else [score], math.nan)
        _extend(self.weights, index, [] if weight == 1 else [weight], 1.0)
        return index

    def add_pair(self, better: str, worse: str, weight: float = 1.0) -> None:
        self.pairs.append((self.add(better, weight=weight), self.add(worse, weight=weight)))

    def add_labelled(self, generation: str, label: bool, weight: float = 1.0) -> None:
        self.add(generation, label=label, weight=weight)


def _extend(values: list[Any], index: int, more: list[Any], unknown: float | None) -> None:
    """Let `values` go on with `more` from `index` on; what it lacks up to there is `unknown`."""
    if more:
        values += [unknown] * (index - len(values)) + more


def pack(key: str, example: Example) -> bytes:
    """A line of JSON: the key, and what the example holds."""
    values = [key, *(getattr(example, name) for name in FIELDS)]
    # "surrogatepass": half a character is no UTF-8, but JSON may hold it; the tokenizer decides about it.
    return ENCODER.encode(values).encode("utf-8", "surrogatepass") + b"\n"


def unpack(record: bytes) -> tuple[str, Example]:
    key, *values = json.loads(record)
    example = Example(*values)
    example.pairs = [(better, worse) for better, worse in example.pairs]
    return key, example


FIELDS = tuple(each.name for each in fields(Example))
LISTS = ("generations", "pairs", "scores", "desirable", "weights")
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"),
                           default=lambda value: value.item())  # numbers of numpy and torch


def references(entry: tuple[str, Example]) -> int:
    """How often an example and its lists are referred to."""
    _, example = entry
    return sys.getrefcount(example) + sum(sys.getrefcount(getattr(example, name)) for name in LISTS)


UNHELD = references(("", Example()))


class Dataset(MutableMapping[str, Example]):
    """Examples by prompt, in the order in which they came; `data[prompt]` makes an empty one on first use.

    Only the last few thousand are objects in memory, besides those that somebody still refers to and may yet change;
    the others are kept on disk, and read when they are asked for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_out: Counter[str] = Counter()  # why rows or pairs were left out -> how many
        self.numbers: dict[bytes, int] = {}  # digest of a prompt -> number of its example
        self.open: dict[int, tuple[str, Example]] = {}
        self.closed: Records | None = None
        self.most, self.made = OPEN, 0

    def __getitem__(self, prompt: str) -> Example:
        number = self.numbers.get(digest(prompt))
        if number is None:
            example = self[prompt] = Example(prompt=prompt, dataset_name=self.name)
            return example
        return self.example(number)

    def __setitem__(self, prompt: str, example: Example) -> None:
        number = self.numbers.setdefault(digest(prompt), self.made)
        self.made = max(self.made, number + 1)
        self._keep_open(number, (prompt, example))

    def __delitem__(self, prompt: str) -> None:
        if prompt not in self:
            raise KeyError(prompt)
        self.open.pop(self.numbers.pop(digest(prompt)), None)

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and digest(prompt) in self.numbers

    def get(self, prompt: str, default: Any = None) -> Any:
        return self[prompt] if prompt in self else default  # noqa: SIM401 (which would call itself)

    def __iter__(self) -> Iterator[str]:
        return (unpack(record)[0] for record in self.records())

    def __len__(self) -> int:
        return len(self.numbers)

    def values(self) -> ValuesView[Example]:
        return Examples(self)

    def records(self) -> Iterator[bytes]:
        """Every example as it is now, packed."""
        for number in self.numbers.values():
            if number in self.open:
                yield pack(*self.open[number])
            else:
                assert self.closed is not None
                yield self.closed[number]

    def part(self, places: Iterable[int]) -> "Dataset":
        """The examples at these places, in their order."""
        wanted, part = set(places), Dataset(self.name)
        part.left_out = self.left_out
        for place, record in enumerate(self.records()):
            if place in wanted:
                key, part[key] = unpack(record)
        return part

    def merge(self, other: "Dataset") -> None:
        """Take over the other's examples; those of a prompt that both have are added to ours."""
        self.left_out.update(other.left_out)
        for prompt, theirs in map(unpack, other.records()):
            if prompt not in self:
                self[prompt] = theirs
                continue
            ours, shift = self[prompt], self[prompt].num_generations()
            ours.sft_index = ours.sft_target()
            if ours.sft_index is None and (target := theirs.sft_target()) is not None:
                ours.sft_index = target + shift
            ours.generations += theirs.generations
            ours.pairs += [(better + shift, worse + shift) for better, worse in theirs.pairs]
            _extend(ours.desirable, shift, theirs.desirable, None)
            _extend(ours.scores, shift, theirs.scores, math.nan)
            _extend(ours.weights, shift, theirs.weights, 1.0)

    def example(self, number: int) -> Example:
        if number in self.open:
            return self.open[number][1]
        assert self.closed is not None
        key, example = unpack(self.closed[number])
        self._keep_open(number, (key, example))
        return example

    def _keep_open(self, number: int, entry: tuple[str, Example]) -> None:
        self.open[number] = entry
        if len(self.open) > self.most:
            self._close_unheld()

    def _close_unheld(self) -> None:
        """Write what nobody else refers to; the rest stays, since it may be changed through what refers to it."""
        if self.closed is None:
            self.closed = Records()
        for number in list(self.open):
            if references(self.open[number]) > UNHELD:
                continue
            record = pack(*self.open.pop(number))
            while len(self.closed) <= number:
                self.closed.append(b"")
            if self.closed[number] != record:
                self.closed[number] = record
        self.most = max(OPEN, 2 * len(self.open))


class Examples(ValuesView[Example]):
    """Those of a `Dataset`, without a look-up of each prompt."""

    _mapping: Dataset

    def __iter__(self) -> Iterator[Example]:
        return (self._mapping.example(number) for number in self._mapping.numbers.values())


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def fold_spaces(text: str) -> str:
    return re.sub(r"[ \t]{2,}", " ", text)


class Markers(NamedTuple):
    """What stands around a speaker's turns; a prompt is some turns and the prefix of the assistant's next one."""

    human_prefix: str = "\n<|user|>\n"
    human_suffix: str = ""
    assistant_prefix: str = "\n<|assistant|>\n"
    assistant_suffix: str = ""

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Markers":
        """The markers of a run; keys that its config lacks take their defaults, null is no marker."""
        return cls(**{name: config[name] or "" for name in cls._fields if name in config})

    @property
    def around(self) -> dict[str, tuple[str, str]]:
        """Prefix and suffix of each speaker; text before the first marker has the speaker ''."""
        return {"": ("", ""), "human": (self.human_prefix, self.human_suffix),
                "assistant": (self.assistant_prefix, self.assistant_suffix)}

    def turns(self, prompt: str) -> list[tuple[str, str]]:
        """(speaker, text) of every turn, markers taken out."""
        speakers = {self.human_prefix: "human", self.assistant_prefix: "assistant"}
        if "" in speakers or len(speakers) < 2:
            raise UserError(f"the turns of a prompt cannot be told apart by the prefixes {self.human_prefix!r} and "
                            f"{self.assistant_prefix!r}; they must be two different texts")
        prefixes = sorted(speakers, key=len, reverse=True)  # where one begins with the other, the longer one is meant
        pieces = re.split(f"({'|'.join(map(re.escape, prefixes))})", prompt)
        owners = ["", *(speakers[prefix] for prefix in pieces[1::2])]
        turns = [(owner, text.removesuffix(self.around[owner][1]))
                 for owner, text in zip(owners, pieces[::2], strict=True)]
        return turns if pieces[0] else turns[1:]

    def rewrite_prompt(self, prompt: str, markers: "Markers") -> str:
        """The same turns in other `markers`."""
        if markers == self:
            return prompt
        turns = self.turns(prompt)
        text = "".join(text.join(markers.around[speaker]) for speaker, text in turns)
        return text.removesuffix(markers.assistant_suffix) if turns[-1:] == [("assistant", "")] else text

    def rewrite_response(self, response: str, markers: "Markers") -> str:
        """The same response, closed by the suffix of other `markers`."""
        return response.removesuffix(self.assistant_suffix) + markers.assistant_suffix
