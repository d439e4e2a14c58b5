"""The unit of data: a prompt's ids once and its completions; how they come from text, and who is paired with whom.

Prompt ids are what generation will see. Completion ids are what follows them in the joint tokenisation; where a merge
crosses the boundary, they are the completion's own. Nothing is decoded and encoded again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[int]
BATCH = 1024  # texts in one call of a fast tokenizer


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt's ids once, and its completions by role (chosen, rejected, or KL: another example's)."""

    prompt: Ids
    completions: Mapping[str, Ids]
    key: int  # which prompt it is: groups of the same prompt have the same key
    pair: int = -1  # which pair of that prompt it was taken from; -1: none
    weight: float = 1.0  # by which its loss is multiplied

    def __len__(self) -> int:
        """Ids of the prompt and all completions."""
        return len(self.prompt) + sum(map(len, self.completions.values()))


def starts_with_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer puts a BOS in front of a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str],
           completions: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt (with the one BOS, where the tokenizer puts one) and of the completion after it.

    A completion ends in one EOS: its own (a marker may be one; what follows it is cut off), or one appended here.
    """
    assert len(prompts) == len(completions), (len(prompts), len(completions))
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    prompt_ids = dict(zip(unique := list(dict.fromkeys(prompts)), plain_ids(tokenizer, unique), strict=True))
    joint_ids = plain_ids(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    own_ids = dict[int, list[int]]()
    crossing = [i for i, joint in enumerate(joint_ids) if joint[:len(prompt_ids[prompts[i]])] != prompt_ids[prompts[i]]]
    own_ids.update(zip(crossing, plain_ids(tokenizer, [completions[i] for i in crossing]), strict=True))
    eos: Any = tokenizer.eos_token_id
    encoded = []
    for i, joint in enumerate(joint_ids):
        prompt = prompt_ids[prompts[i]]
        completion = own_ids[i] if i in own_ids else joint[len(prompt):]
        if bos and prompt[:1] == bos:  # the text brought its own
            prompt = prompt[1:]
        encoded.append((bos + prompt, end_once(completion, eos)))
    return encoded


def plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without the special tokens that a tokenizer would add around it."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start:start + BATCH]), add_special_tokens=False, return_attention_mask=False,
                          verbose=False)
        ids += batch["input_ids"]  # pyright: ignore[reportOperatorIssue]: a list of lists, for a list of texts
    return ids


def end_once(completion: list[int], eos: int) -> list[int]:
    """The ids up to and with the first EOS; one is appended where there is none."""
    return completion[:completion.index(eos) + 1] if eos in completion else [*completion, eos]


def cut_prompt(prompt: list[int], longest: int, max_length: int, max_prompt_length: int, mode: str,
               head: int = 0, tail: int = 0) -> list[int]:
    """The prompt as it stands before completions of which the longest has `longest` ids.

    It is cut, to `max_prompt_length`, only when both limits are exceeded. The first `head` ids (BOS) and the last
    `tail` ids (control tokens) survive and count; between them `keep_start` keeps the first ids, `keep_end` the last.
    """
    if len(prompt) <= max_prompt_length or len(prompt) + longest <= max_length:
        return prompt
    body = prompt[head:len(prompt) - tail]
    room = max(max_prompt_length - head - tail, 0)
    kept = body[:room] if mode == "keep_start" else body[len(body) - room:]
    return prompt[:head] + kept + prompt[len(prompt) - tail:]


def with_mismatched(batch: Sequence[Group], max_length: int) -> list[Group]:
    """Give every group the completion of the next one, as role KL; the last gets the first's.

    The batch is ordered so that neighbours have different prompts wherever that can be. The prompt stays as it is, the
    borrowed completion is cut to what `max_length` leaves after it.
    """
    assert len(batch) > 1, "a KL pair needs another example"
    ordered = apart(batch)
    borrowed = [next(iter(group.completions.values())) for group in [*ordered[1:], ordered[0]]]
    return [replace(group, completions={**group.completions, "KL": completion[:max_length - len(group.prompt)]})
            for group, completion in zip(ordered, borrowed, strict=True)]


def apart(batch: Sequence[Group]) -> list[Group]:
    """The batch in an order, taken as a ring, in which groups of one prompt are not neighbours if that can be."""
    ring = list(batch)
    if all(group.key != after.key for group, after in zip(ring, [*ring[1:], ring[0]], strict=True)):
        return ring
    # Most frequent prompts first, dealt to every second place and then to the places between.
    count = Counter(group.key for group in batch)
    first = {group.key: place for place, group in reversed(list(enumerate(batch)))}
    by_prompt = sorted(batch, key=lambda group: (-count[group.key], first[group.key]))
    places = [*range(0, len(batch), 2), *range(1, len(batch), 2)]
    for place, group in zip(places, by_prompt, strict=True):
        ring[place] = group
    return ring
