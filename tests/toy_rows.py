"""Rows and dialogues that tests of data write in a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback import Markers, Messages

CUSTOM = Markers("### H:\n", "</h>", "### A:\n", "</a>")


def say(*texts: str) -> Messages:
    """A dialogue that a user begins, with the texts in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def reply(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def system(text: str) -> Messages:
    return [{"role": "system", "content": text}]


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {text}" for place, text in enumerate(texts))


def folder(tmp_path: Path, rows: Sequence[Any], split: str = "train") -> str:
    """A folder whose `split` has the rows, one a line."""
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


PAIRED = {
    "strings with a prompt": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "whole conversations": {"chosen": say("Hi", "Yes"), "rejected": say("Hi", "No")},
    "a prompt of messages": {"prompt": say("Hi"), "chosen": reply("Yes"), "rejected": reply("No")},
    "UltraFeedback": {"prompt": "Hi", "chosen": say("Hi", "Yes"), "rejected": say("Hi", "No"), "score_chosen": 8.0,
                      "score_rejected": 8.0},
    "a prompt, answers of messages": {"prompt": "Hi", "chosen": reply("Yes"), "rejected": reply("No")},
    "transcripts": {"chosen": transcript("Hi", "Yes"), "rejected": transcript("Hi", "No")},
    "prompt is null": {"prompt": None, "chosen": say("Hi", "Yes"), "rejected": say("Hi", "No")},
}
SINGLE = {
    "strings": {"prompt": "Hi", "completion": "Yes"},
    "a prompt of messages": {"prompt": say("Hi"), "completion": reply("Yes")},
    "messages": {"messages": say("Hi", "Yes")},
    "messages beside a prompt": {"prompt": "Hi", "messages": say("Hi", "Yes")},
}


# Rows in the schemas of the sets on the Hub --------------------------------------------------------------------------

def shp_row(history: str, A: str, B: str, scores: tuple[float, float] = (4, 1), label: int = 1) -> dict[str, Any]:
    return {"post_id": "p1", "domain": "askculinary_train", "upvote_ratio": 0.99, "history": history,
            "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": scores[0],
            "score_B": scores[1], "human_ref_A": A, "human_ref_B": B, "labels": label, "seconds_difference": 1.0,
            "score_ratio": 999.0}


def oasst_row(name: str, parent: str | None, text: str, rank: int | None = None, *, role: str | None = None,
              lang: str = "en", tree: str = "tree") -> dict[str, Any]:
    """A message; without a role, one with a rank is the assistant's."""
    return {"message_id": name, "parent_id": parent, "message_tree_id": tree, "tree_state": "ready_for_export",
            "text": text, "role": role or ("prompter" if rank is None else "assistant"), "lang": lang,
            "review_count": 3, "review_result": True, "deleted": False, "rank": rank, "synthetic": False,
            "model_name": None, "emojis": None}


def ultrabin_row(chosen: Messages, rejected: Messages, scores: tuple[float, float] = (8.0, 6.5)) -> dict[str, Any]:
    return {"prompt": chosen[0]["content"] if chosen else "", "prompt_id": "0", "chosen": chosen, "rejected": rejected,
            "messages": chosen, "score_chosen": scores[0], "score_rejected": scores[1]}


def ultrachat_row(messages: Messages) -> dict[str, Any]:
    return {"prompt": messages[0]["content"] if messages else "", "prompt_id": "0", "messages": messages}


def alpaca_row(instruction: str, output: str) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, "generator": "text_davinci_003", "dataset": "helpful_base"}
