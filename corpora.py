"""The data sets: one function each, from rows in the source's own schema to Examples.

`dataloader.py` takes them over by name; users add theirs there.
"""

import re
from collections.abc import Sequence
from typing import Any

from feedback import Dataset, Markers, Messages, fold_spaces
from sources import read_rows
from utils import REPOSITORY, UserError


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
