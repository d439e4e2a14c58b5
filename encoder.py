"""Ids of many prompts and completions, as `groups.encode` gives them, in a fraction of the time.

A prompt is not tokenised again for each completion: the joint ids are those before the last place where this tokenizer
always splits, and those of the text from there on. That it does is tried out, not known: see `splits_before`. Where
it does not, or the first texts of a run come out otherwise than by `encode`, that takes over.
"""

import contextlib
import os
import re
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from groups import encode, end_once, starts_with_bos

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Encoded = tuple[Ids, list[Ids]]  # of a prompt and of each of its completions
PROBED = 256  # examples of a run that are encoded in both ways
TAILS, LONGEST = 8, 64  # ends of prompts that are tried out, and their characters, at most
TRIED = 32  # tokens added to a vocabulary, at most, that are tried out as what follows
LAST = re.compile(r".*[A-Za-z](?=[\n<>|\[\](){}:#/*=])", re.DOTALL)  # up to the last letter before one of these
# What stands before and after a place at which the tokenizer must split, whatever it is.
BEFORE = [*string.ascii_letters, "two words", "\n\nAssistant", "<|assistant", "1a", "'s", "don't", "[/INST", "### A",
          "é a", "中a", "  x", "http://a.b/c", "A.B", "x_y", "a-b", "\ta", "end. N"]
AFTER = ["", " ", "  ", "\n", "\n\n", "\n \n", "\t", "\r\n", "a", "Z", " a", "Yes", " no", "'s", "'ll", "\u2019s", "1",
         " 1", "12345", "1,000.5", ".", "...", ",", "!", "?", "|", ">", "|>", "<", "</s>", "<|", "]", ":", "::", "#",
         "=", "-", "--", "_", "\\", "/", "//", "@", "\u00a0", "\u0301", "\u0338", "\u200d", "\u200b", "\ufe0f",
         "\u2028", "\u3000", "é", "e\u0301", "中文", "あ", "\u0627", "؟", "ß", "\u0131", "ﬁ", "½", "🙂", "👍🏽",
         "\x00", "\ufeff", "▁", "Ġ"]


class Encoder:
    """A tokenizer's way from prompts with their completions to ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.eos: Any = tokenizer.eos_token_id
        bos: Any = tokenizer.bos_token_id
        self.bos: Ids = [bos] if starts_with_bos(tokenizer) else []
        self.backend = bare(tokenizer)
        self.tails = dict[str, Ids | None]()  # the end of a prompt -> its ids; None: not where this tokenizer splits
        self.probed = 0

    def __call__(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[Encoded]:
        """Ids of each prompt and of the completions after it, of which any number follow one prompt."""
        with in_parallel():
            if self.backend is not None and self.probed < PROBED:
                self.probed += len(prompts)
                some = prompts[:PROBED], completions[:PROBED]
                if self._jointly(*some) != self._shortly(self.backend, *some):
                    self.backend = None
            return (self._jointly(prompts, completions) if self.backend is None else
                    self._shortly(self.backend, prompts, completions))

    def _jointly(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[Encoded]:
        """By `encode`. A prompt without completions is encoded with an empty one."""
        texts = [(prompt, text) for prompt, its in zip(prompts, completions, strict=True) for text in its or [""]]
        encoded = iter(encode(self.tokenizer, [prompt for prompt, _ in texts], [text for _, text in texts]))
        found = list[Encoded]()
        for its in completions:
            pairs = [next(encoded) for _ in its or [""]]
            found.append((pairs[0][0], [ids for _, ids in pairs][:len(its)]))
        return found

    def _shortly(self, backend: "Tokenizer", prompts: Sequence[str], completions: Sequence[Sequence[str]]
                 ) -> list[Encoded]:
        prompt_ids, tails = ids_of(backend, prompts), [self._tail(backend, prompt) for prompt in prompts]
        short = {number: ids for number, tail in enumerate(tails) if (ids := self.tails.get(tail))
                 and prompt_ids[number][-len(ids):] == ids}
        others = [number for number in range(len(prompts)) if number not in short]
        found = dict(zip(others, self._jointly([prompts[number] for number in others],
                                               [completions[number] for number in others]), strict=True))
        texts = [(number, text) for number in short for text in completions[number]]
        joint = ids_of(backend, [tails[number] + text for number, text in texts])
        crossing = [place for place, (number, _) in enumerate(texts)
                    if joint[place][:len(short[number])] != short[number]]
        own = dict(zip(crossing, ids_of(backend, [texts[place][1] for place in crossing]), strict=True))
        after = iter([end_once(own[place] if place in own else ids[len(short[number]):], self.eos)
                      for place, ((number, _), ids) in enumerate(zip(texts, joint, strict=True))])
        for number in short:
            found[number] = self._with_bos(prompt_ids[number]), list(islice(after, len(completions[number])))
        return [found[number] for number in range(len(prompts))]

    def _with_bos(self, ids: Ids) -> Ids:
        return ids if self.bos and ids[:1] == self.bos else self.bos + ids  # the text may bring its own

    def _tail(self, backend: "Tokenizer", prompt: str) -> str:
        """The end of the prompt from which on it is tokenised again, tried out where it is new."""
        found = LAST.match(prompt)
        tail = prompt[found.end():] if found else ""
        if 0 < len(tail) <= LONGEST and tail not in self.tails and len(self.tails) < TAILS:
            added = [token.content for token in backend.get_added_tokens_decoder().values()]
            [ids] = ids_of(backend, [tail])
            self.tails[tail] = ids if ids and splits_before(backend, tail, added) else None
        return tail


def splits_before(backend: "Tokenizer", tail: str, added: Sequence[str]) -> bool:
    """Whether a text that goes on with `tail` after a letter is always split there: its ids are those of its parts.

    Tried out on what is likely to go wrong before and after; and no token that was added to the vocabulary may begin
    in a text before and go on beyond the tail.
    """
    if any(text[place - 1].isalpha() and text[place:].startswith(tail) for text in added for place in
           range(1, len(text) - len(tail) + 1)):
        return False
    after = [tail + text for text in [*AFTER, *added[:TRIED], *(" " + text for text in added[:TRIED])]]
    parts = [backend.encode_batch(texts, add_special_tokens=False) for texts in (BEFORE, after)]
    whole = iter(backend.encode_batch([first + second for first in BEFORE for second in after],
                                      add_special_tokens=False))
    for first in parts[0]:
        for second in parts[1]:
            joint, place = next(whole), len(first.ids)
            if joint.ids != first.ids + second.ids or joint.word_ids[place - 1] == joint.word_ids[place]:
                return False
    return True


def bare(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer | None":
    """A copy of a fast tokenizer's own that neither cuts nor pads; None: it is none."""
    from tokenizers import Tokenizer

    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        return None
    copy = Tokenizer.from_str(found.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return copy


def ids_of(backend: "Tokenizer", texts: Sequence[str]) -> list[Ids]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]



@contextlib.contextmanager
def in_parallel() -> Iterator[None]:
    """Context in which fast tokenizers use every core, whatever TOKENIZERS_PARALLELISM says to what forks later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
