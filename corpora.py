"""The data sets: one function each, from rows in the source's own schema to Examples.

`dataloader.py` takes them over by name; users add theirs there.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from feedback import Dataset, Example, Markers, Messages, fold_spaces
from shapes import HH_ANSWER, get_file, is_number, messages_of, transcript_turns
from sources import read_rows
from utils import REPOSITORY, UserError

HH_QUESTION = "\n\nHuman:"
SHP_RATIO, SHP_PAIRS, SHP_SEED = 2, 5, 0  # in training: the least score ratio, and the most pairs of a prompt


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
        _require(row, place, "Anthropic/hh-rlhf", chosen=str, rejected=str)
        before, marker, chosen = row["chosen"].rpartition(HH_ANSWER)
        rejected = row["rejected"].removeprefix(before + marker)
        if not marker:
            data.left_out["the chosen transcript has no '\\n\\nAssistant: '"] += 1
        elif rejected == row["rejected"] or HH_ANSWER in rejected:
            data.left_out["the prompts of the two sides differ"] += 1
        elif HH_QUESTION in chosen or HH_QUESTION in rejected:
            data.left_out["the last reply is missing: a human turn follows the last '\\n\\nAssistant: '"] += 1
        else:
            example = _example(data, markers, transcript_turns(before), place)
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


def get_shp(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
            source: str = "stanfordnlp/SHP") -> Dataset:
    """Reddit's questions and how their answers were voted (Ethayarajh et al., 2022): `stanfordnlp/SHP`.

    The history is the prompt, `labels` (1: A is preferred) decides over the scores, the first answer is the SFT target.
    Training takes the rows whose higher score is at least twice the lower one, and of each prompt a random sample of
    at most 5 pairs; the answers of the others stay.
    """
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset("shp")
    for place, row in read_rows(source, split, own_split=split):
        _require(row, place, "stanfordnlp/SHP", history=str, human_ref_A=str, human_ref_B=str, score_A=float,
                 score_B=float, labels=bool)
        low, high = sorted([row["score_A"], row["score_B"]])
        if split == "train" and (high < SHP_RATIO * low or high == low):  # not divided: a score may be zero
            data.left_out[f"the score ratio is below {SHP_RATIO}"] += 1
            continue
        example = _example(data, markers, [{"role": "user", "content": row["history"]}], place)
        example.truncation_mode, example.sft_index = "keep_start", 0
        a, b = (example.add(markers.answer(fold_spaces(row[f"human_ref_{side}"])), score=float(row[f"score_{side}"]))
                for side in "AB")
        example.pairs.append((a, b) if row["labels"] else (b, a))
    if split == "train":
        _sample_pairs(data, SHP_PAIRS, random.Random(SHP_SEED))
    return data


def _sample_pairs(data: Dataset, most: int, draw: random.Random) -> None:
    for example in data.values():
        if (excess := len(example.pairs) - most) > 0:
            kept = sorted(draw.sample(range(len(example.pairs)), most))
            example.pairs = [example.pairs[pair] for pair in kept]
            data.left_out[f"their prompt has more than {most} pairs"] += excess


def get_oasst(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
              source: str = "OpenAssistant/oasst1") -> Dataset:
    """English replies that volunteers ranked (Köpf et al., 2023): the messages of `OpenAssistant/oasst1`.

    A reply of rank r >= 1 is paired with the sibling of rank r - 1, which is the better one. The prompt is the path
    from the root to their parent, all of it English; the best reply is the SFT target, and ranks are the scores.
    """
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset("oasst")
    messages = dict[str, Mapping[str, Any]]()
    for place, row in read_rows(source, split, own_split="train" if split == "train" else "validation"):
        _require(row, place, "OpenAssistant/oasst1", message_id=str, text=str, role=str, lang=str)
        if row["role"] not in OASST_ROLES or not (row.get("rank") is None or is_number(row["rank"])):
            raise UserError(f"{place}: role is {row['role']!r} and rank {row.get('rank')!r}, allowed are "
                            f"{' and '.join(OASST_ROLES)}, and null or a number, as in OpenAssistant/oasst1")
        messages[row["message_id"]] = row
    for parent, replies in _ranked_siblings(messages, data.left_out).items():
        pairs = _neighbouring_ranks(replies)
        paired = {row["message_id"]: row for pair in pairs for row in pair}
        if unpaired := len(replies) - len(paired):
            data.left_out["no sibling has a neighbouring rank"] += unpaired
        if pairs:
            example = _example(data, markers, _path(messages, parent), "")
            example.sft_index = 0
            index = {name: example.add(markers.answer(fold_spaces(row["text"])), score=float(row["rank"]))
                     for name, row in paired.items()}
            example.pairs += [(index[better["message_id"]], index[worse["message_id"]]) for better, worse in pairs]
    return data


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _ranked_siblings(messages: Mapping[str, Mapping[str, Any]], left_out: Counter[str]
                     ) -> dict[str, list[Mapping[str, Any]]]:
    """The ranked English replies to each prompter's message at the end of an English path."""
    siblings = defaultdict[str, list[Mapping[str, Any]]](list)
    for row in messages.values():
        if row["role"] != "assistant":
            continue
        if row["lang"] != "en":
            left_out["the reply is not English"] += 1
        elif row.get("rank") is None:
            left_out["the reply has no rank"] += 1
        elif not (path := _path(messages, row.get("parent_id"))) or path[-1]["role"] != "user":
            left_out["a message before the reply is missing or not English"] += 1
        else:
            siblings[row["parent_id"]].append(row)
    return siblings


def _path(messages: Mapping[str, Mapping[str, Any]], end: str | None) -> Messages:
    """From the root to the message `end`; nothing where one is missing, or not English."""
    turns, seen = Messages(), set[str]()
    while end is not None:
        message = messages.get(end)
        if message is None or message["lang"] != "en" or end in seen:
            return []
        turns.append({"role": OASST_ROLES[message["role"]], "content": message["text"]})
        seen.add(end)
        end = message.get("parent_id")
    return turns[::-1]


def _neighbouring_ranks(replies: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(better, worse) for each reply that has a sibling of the rank above it, from the best on."""
    ordered = sorted(replies, key=lambda row: row["rank"])
    of_rank = {row["rank"]: row for row in reversed(ordered)}  # the first of each
    return [(of_rank[row["rank"] - 1], row) for row in ordered if row["rank"] - 1 in of_rank]


def get_ultrabin(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
                 source: str = "HuggingFaceH4/ultrafeedback_binarized") -> Dataset:
    """UltraFeedback as Zephyr was trained on it (Tunstall et al., 2023): `HuggingFaceH4/ultrafeedback_binarized`.

    The turns before each side's last message are the prompt. The first row's chosen answer is the SFT target; pairs
    with tied scores stay, pairs of twice the same text are left out.
    """
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset("ultrabin")
    for place, row in read_rows(source, split, own_split=f"{split}_prefs"):
        _require(row, place, "HuggingFaceH4/ultrafeedback_binarized", chosen=list, rejected=list, score_chosen=float,
                 score_rejected=float)
        chosen, rejected = (messages_of(row[side], place) for side in ("chosen", "rejected"))
        if not all(side and side[-1]["role"] == "assistant" for side in (chosen, rejected)):
            data.left_out["a side does not end with an assistant message"] += 1
        elif chosen[:-1] != rejected[:-1]:
            data.left_out["the prompts of the two sides differ"] += 1
        elif (better := fold_spaces(chosen[-1]["content"])) == (worse := fold_spaces(rejected[-1]["content"])):
            data.left_out["the two answers are the same"] += 1
        else:
            example = _example(data, markers, chosen[:-1], place)
            example.truncation_mode, example.sft_index = "keep_start", 0
            example.pairs.append((example.add(markers.answer(better), score=float(row["score_chosen"])),
                                  example.add(markers.answer(worse), score=float(row["score_rejected"]))))
    return data


def get_ultrachat(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
                  source: str = "HuggingFaceH4/ultrachat_200k") -> Dataset:
    """Dialogues to imitate (Ding et al., 2023): `HuggingFaceH4/ultrachat_200k`.

    The last assistant message is the SFT target, the turns before it are the prompt, and what follows it is dropped.
    """
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset("ultrachat")
    for place, row in read_rows(source, split, own_split=f"{split}_sft"):
        _require(row, place, "HuggingFaceH4/ultrachat_200k", messages=list)
        messages = messages_of(row["messages"], place)
        replies = [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]
        if not replies:
            data.left_out["no assistant message follows another"] += 1
            continue
        example = _example(data, markers, messages[:replies[-1]], place)
        example.add(markers.answer(fold_spaces(messages[replies[-1]]["content"])))
        example.sft_index = 0
    return data


def get_alpacaeval(split: str, human_prefix: str, human_suffix: str, assistant_prefix: str, assistant_suffix: str, *,
                   source: str = "tatsu-lab/alpaca_eval") -> Dataset:
    """AlpacaEval's instructions, each with the reference model's output: `tatsu-lab/alpaca_eval`. Test split only."""
    if split != "test":
        raise UserError(f"datasets: alpacaeval has no {split} split, it is there to evaluate on; name another data set")
    markers = Markers(human_prefix, human_suffix, assistant_prefix, assistant_suffix)
    data = Dataset("alpacaeval")
    for place, row in read_rows(source, split, own_split="eval", file="alpaca_eval.json", whole=True):
        _require(row, place, "tatsu-lab/alpaca_eval", instruction=str, output=str)
        example = data[markers.prompt([{"role": "user", "content": row["instruction"]}])]
        example.add(markers.answer(row["output"]))
        example.sft_index, example.original_prompt = 0, row["instruction"]
    return data


# What these give depends on the rows of a `source` on disk, on their arguments and on the code of this repository.
OF_THEIR_SOURCE = (get_hh, get_hh_helpful, get_hh_harmless, get_shp, get_oasst, get_ultrabin, get_ultrachat,
                   get_alpacaeval)


def _example(data: Dataset, markers: Markers, turns: Messages, place: str) -> Example:
    return data[fold_spaces(markers.prompt(turns, place))]


COLUMNS = {str: "text", list: "a list of {role, content}", float: "a finite number", bool: "0 or 1"}


def _require(row: Mapping[str, Any], place: str, schema: str, **columns: type) -> None:
    """Errors: `UserError` for the first column that does not hold what `schema`, a set on the Hub, has there."""
    for name, kind in columns.items():
        value = row.get(name)
        fits = (is_number(value) if kind is float else value in (0, 1) if kind is bool else isinstance(value, kind))
        if not fits:
            raise UserError(f"{place}: {name!r} is {value!r:.40}, where {COLUMNS[kind]} is needed, as in {schema}")
