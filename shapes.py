"""Data sets from rows in the shapes that `datasets` and TRL users have: pairs, labels, dialogues, scored answers."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import Any, NamedTuple, TypeGuard

from feedback import Dataset, Example, Markers, Messages
from sources import HUB, read_hub, read_rows
from utils import UserError

Order = list[int]  # indices of the answers, the best first
# Which pairs of answers to a prompt become pairs; those with the same score do not.
PAIRINGS: dict[str, Callable[[Order], list[tuple[int, int]]]] = {
    "best_worst": lambda order: [(order[0], order[-1])] if len(order) > 1 else [],
    "neighbours": lambda order: list(pairwise(order)),
    "all": lambda order: list(combinations(order, 2)),
}
RULES = "pairs=best_worst, pairs=neighbours, pairs=all, labels=above:NUMBER or labels=mean"
RULE_OPTIONS = ("pairs", "labels")


def get_file(source: str, split: str, markers: Markers, name: str | None = None,
             options: Mapping[str, str] | None = None) -> Dataset:
    """Rows of a file, a folder or (`hf:org/name`) the Hub in the shapes that `datasets` and TRL users have.

    Paired: chosen, rejected, with prompt or without (strings, or lists of messages). Unpaired: prompt, completion,
    label, or messages and label. SFT: prompt and completion, or messages. Scored: prompt, completions and scores, made
    into pairs or labels by a rule (see `scoring_rule`). Any row may have a weight. Prompts are cut at their start when
    long. options: of the name, as in `prefs.jsonl?pairs=all`.
    """
    options, data = options or {}, Dataset(name or source)
    rule = scoring_rule(options)
    rows = (read_hub(source.removeprefix(HUB), split, options) if source.startswith(HUB)
            else read_rows(source, split))
    for place, row in rows:
        if rule:
            if not _is_scored(row):
                raise UserError(f"{place}: no completions with scores (has {', '.join(map(repr, row))}), which "
                                f"{' and '.join(RULE_OPTIONS)} are for; leave the option out of {source!r}")
            add_scored(data, row, rule, markers, place)
        elif "chosen" in row or "rejected" in row:
            turns, (chosen, rejected) = _conversation(row, ("chosen", "rejected"), place)
            _example(data, turns, markers, place).add_pair(markers.answer(chosen), markers.answer(rejected),
                                                           _weight(row, place))
        elif _is_scored(row):
            raise UserError(f"{place}: a row of scored answers; say what to make of them, as in "
                            f"\"datasets=['{source}?pairs=best_worst']\"; allowed are {RULES}")
        else:
            turns, (answer,) = _conversation(row, ("messages" if "messages" in row else "completion",), place)
            example = _example(data, turns, markers, place)
            label = None if row.get("label") is None else _label(row["label"], place)
            index = example.add(markers.answer(answer), label=label, weight=_weight(row, place))
            if label is None and example.sft_index is None:
                example.sft_index = index
    return data


# Scored answers ------------------------------------------------------------------------------------------------------

class Rule(NamedTuple):
    """What to make of a prompt's scored answers: pairs or labels."""

    pairs: Callable[[Order], list[tuple[int, int]]] | None = None
    label: Callable[[float, Sequence[float]], bool | None] | None = None  # of a score among its row's; None: neither


def scoring_rule(options: Mapping[str, str]) -> Rule | None:
    """What `pairs=` or `labels=` asks for; None: neither is there.

    `pairs=best_worst`, `neighbours` (each with the next lower) or `all`; `labels=above:7` (a score of at least 7 is
    desirable) or `mean` (above its row's mean; one that is the mean gets no label). Higher is better.
    """
    asked = {key: options[key] for key in RULE_OPTIONS if key in options}
    if not asked:
        return None
    [(key, value), *more] = asked.items()
    kind, _, number = value.partition(":")
    if not more and key == "pairs" and value in PAIRINGS:
        return Rule(pairs=PAIRINGS[value])
    if not more and key == "labels" and value == "mean":
        return Rule(label=_above_mean)
    if not more and key == "labels" and kind == "above" and is_number(point := _parsed(number)):
        return Rule(label=lambda score, scores: score >= point)
    raise UserError(f"datasets: got {'&'.join(f'{key}={value}' for key, value in asked.items())}, allowed is one of "
                    f"{RULES}")


def add_scored(data: Dataset, row: Mapping[str, Any], rule: Rule, markers: Markers, place: str) -> None:
    """Add the row's answers, with the pairs or labels of the rule; the best is imitated, if it is not undesirable."""
    answers, scores = _scored(row, place)
    turns = messages_of(_field(row, "prompt", place), place)
    example, weight = _example(data, turns, markers, place), _weight(row, place)
    target = example.sft_target()
    labels = [rule.label(score, scores) if rule.label else None for score in scores]
    indices = [example.add(markers.answer(answer), label=label, score=score, weight=weight)
               for answer, label, score in zip(answers, labels, scores, strict=True)]
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    example.sft_index = target if target is not None else indices[order[0]] if labels[order[0]] is not False else None
    pairs = rule.pairs(order) if rule.pairs else []
    example.pairs += [(indices[better], indices[worse]) for better, worse in pairs if scores[better] > scores[worse]]
    if ties := sum(scores[better] == scores[worse] for better, worse in pairs):
        data.left_out["two answers have the same score"] += ties
    if rule.pairs and not pairs:
        data.left_out["a single answer makes no pair"] += 1


def _above_mean(score: float, scores: Sequence[float]) -> bool | None:
    middle = mean(scores)
    return None if score == middle else score > middle


def _is_scored(row: Mapping[str, Any]) -> bool:
    return not any(row.get(name) for name in ("completion", "messages")) and any(
        row.get(name) is not None for name in ("completions", "responses"))


def _scored(row: Mapping[str, Any], place: str) -> tuple[list[str], list[float]]:
    """The answers of a row, and the score of each."""
    name = "responses" if row.get("completions") is None and "responses" in row else "completions"
    answers: Any = _field(row, name, place)
    scores: Any = row.get("scores")
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{place}: {name} is {answers!r:.40}, where a list of texts or of {{text, score}} is needed")
    if scores is None:
        scores = [answer.get("score") if isinstance(answer, dict) else None for answer in answers]
    texts: list[Any] = [_text(answer) for answer in answers]
    if not isinstance(scores, list) or len(scores) != len(answers) or not all(map(is_number, scores)):
        raise UserError(f"{place}: scores are {scores!r:.60}, where {len(answers)} finite numbers are needed, one to "
                        f"each of the {name}")
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: one of {name} is no text, nor {{text, score}}, nor {{content, score}}")
    return texts, scores


def _text(answer: Any) -> Any:
    if not isinstance(answer, dict):
        return answer
    return answer.get("content") if answer.get("text") is None else answer["text"]


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Dialogues -----------------------------------------------------------------------------------------------------------

HH_ANSWER = "\n\nAssistant: "


def transcript_turns(transcript: str) -> Messages:
    """Turns of a `Human: … Assistant: …` transcript, split at either word and colon before white space."""
    parts = re.split(r"(Human|Assistant):(?=\s|$)", transcript)
    return [{"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
            for speaker, text in zip(parts[1::2], parts[2::2], strict=True)]


def _example(data: Dataset, turns: Messages, markers: Markers, place: str) -> Example:
    example = data[markers.prompt(turns, place)]
    if len(turns) == 1:
        example.original_prompt = turns[0]["content"]
    return example


def _conversation(row: Mapping[str, Any], fields: Sequence[str], place: str) -> tuple[Messages, list[str]]:
    """The turns before the answer, and the answer in each of `fields`."""
    values = [_field(row, name, place) for name in fields]
    prompt = row.get("prompt")
    if all(isinstance(value, str) for value in values):
        if prompt is not None:
            return messages_of(prompt, place), values
        before, marker, _ = values[0].rpartition(HH_ANSWER)
        answers = [value.removeprefix(before + marker) for value in values]
        if not marker or any(value == answer or HH_ANSWER in answer
                             for value, answer in zip(values, answers, strict=True)):
            raise UserError(f"{place}: no 'prompt', and {' and '.join(fields)} are no transcripts of one "
                            "'\\n\\nHuman: … \\n\\nAssistant: …' dialogue; add a prompt")
        return transcript_turns(before), answers
    conversations = [messages_of(value, place) for value in values]
    for turns in conversations:
        if not turns or turns[-1]["role"] != "assistant":
            raise UserError(f"{place}: {' and '.join(fields)} must end with an assistant message")
    histories = [turns[:-1] for turns in conversations]
    if any(history != histories[0] for history in histories):
        raise UserError(f"{place}: the conversations in {' and '.join(fields)} differ before their last message")
    turns = histories[0]
    if prompt is not None and (not turns or turns[0]["role"] == "assistant"):  # else the answers bring their prompt
        turns = messages_of(prompt, place) + turns
    return turns, [conversation[-1]["content"] for conversation in conversations]


def messages_of(value: Any, place: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value):
        raise UserError(f"{place}: got {str(value)[:60]!r}, where text or a list of {{role, content}} is needed")
    return value


# Fields --------------------------------------------------------------------------------------------------------------

def _field(row: Mapping[str, Any], name: str, place: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"{place}: no {name!r} (has {', '.join(map(repr, row))}); a row needs chosen and rejected, or "
                        "completion, or messages, and a prompt where those do not hold it")
    return row[name]


def _label(value: Any, place: str) -> bool:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise UserError(f"{place}: label is {value!r}, allowed are true and false")


def _weight(row: Mapping[str, Any], place: str) -> float:
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if not is_number(weight) or weight < 0:
        raise UserError(f"{place}: weight is {weight!r}, allowed is a finite number of at least 0")
    return weight


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
