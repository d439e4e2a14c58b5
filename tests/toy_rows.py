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
