"""A judge that likes the longer answer, behind an endpoint on this machine, for a command that asks one: alpaca_eval.

    python benchmarks/stand_in.py alpaca_eval --model_outputs FILE --reference_outputs FILE
        --annotators_config alpaca_eval_gpt4 --fn_metric get_winrate --sort_by win_rate

The command is run with OPENAI_BASE_URL and OPENAI_API_KEY set for it. It asks in the words of `alpaca_eval_gpt4`, and
is answered as these ask; of two answers of one length the first is the better one. Quality is not looked at.
"""

import os
import re
import subprocess
import sys
from typing import Any

from endpoint import Endpoint, completion


def preferred(question: str) -> str:
    """The ranks of the two answers that are between triple quotes, as a list in Python's words."""
    first, second = re.findall(r'"answer": """(.*?)"""\n', question, re.DOTALL)
    order = ("model_1", "model_2") if len(first) >= len(second) else ("model_2", "model_1")
    return repr([{"model": model, "rank": rank} for rank, model in enumerate(order, 1)])


def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    text = preferred(request["body"]["messages"][-1]["content"])
    return 200, completion(text, usage=(0, 0))


def main() -> int:
    with Endpoint(reply) as judge:
        asked = subprocess.run(sys.argv[1:], env={**os.environ, "OPENAI_BASE_URL": judge.url, "OPENAI_API_KEY": "none"})
        print(f"{len(judge.requests):,} questions were asked", file=sys.stderr)
    return asked.returncode


if __name__ == "__main__":
    raise SystemExit(main())
