"""Judges at work: how they are asked, and the verdicts that they come to, each alone and as a panel."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from feedback import Markers
from hearing import Hearing, Table
from judge import (
    Bill,
    Comparison,
    Docket,
    FileTemplate,
    Judge,
    PromptTemplate,
    Verdict,
    VerdictCache,
    make_judge,
    notice,
)
from utils import UserError
from verdicts import panel_verdict

if TYPE_CHECKING:
    from anytime import Stopping

DEFAULT_JUDGE = "gpt-4-0613"
DEFAULT_CACHE = ".cache/verdicts.jsonl"


@dataclass(frozen=True)
class Asking:
    """How judges are asked: what all of compare.py's commands have in common.

    judge: what `--judge` takes, or any object of that kind; or several, as a panel. orders: 2 asks in both orders, 1 in
    a shuffled one. cache: a file or folder of earlier answers (None: none are kept). price: dollars per million tokens,
    in and out. The others are as on the command line.
    """

    judge: str | Judge | Sequence[str | Judge] = DEFAULT_JUDGE
    labels: str = "12"
    seed: int = 0
    sleep_time: float | None = None
    orders: int = 2
    cache: str | Path | None = None
    concurrency: int | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    price: Sequence[float] | None = None
    template: str | Path | None = None
    reason: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.sleep_time is not None and not self.sleep_time >= 0:
            raise UserError(f"--sleep_time: got {self.sleep_time}; give 0 or more seconds")
        if self.orders not in (1, 2):
            raise UserError(f"--orders: got {self.orders}; give 2 (both) or 1 (a shuffled one)")
        names = [judge for judge in self.several if isinstance(judge, str)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"--judge: {', '.join(sorted(twice))} is named twice; a panel has different judges")
        if not self.several:
            raise UserError("--judge: got none; give at least one")

    @property
    def several(self) -> Sequence[str | Judge]:
        return self.judge if isinstance(self.judge, Sequence) and not isinstance(self.judge, str) else [self.judge]

    def bill(self) -> Bill:
        return Bill((self.price[0], self.price[1]) if self.price else None, self.max_requests, self.max_cost)

    def words(self, markers: Markers) -> PromptTemplate:
        """What is asked. markers: of the prompts."""
        if self.template:
            return FileTemplate(self.template, markers, self.labels, self.reason)
        return PromptTemplate(markers, self.labels, self.reason)

    def judges(self, markers: Markers) -> list[Judge]:
        words = self.words(markers)
        return [make_judge(judge, words, self.seed, self.sleep_time, self.concurrency, self.max_tokens)
                if isinstance(judge, str) else judge for judge in self.several]


@dataclass(frozen=True)
class Heard:
    """What one or several judges said of the same comparisons.

    by_judge: each judge's verdicts; verdicts: the only judge's, or the panel's, by majority. orders: that each was
    asked in. cached: answers that were known before. Where `stopping` ended it, verdicts are those of the first
    comparisons.
    """

    judges: Sequence[Judge]
    by_judge: list[list[Verdict]]
    verdicts: list[Verdict]
    orders: list[int]
    cached: int
    stopping: "Stopping | None" = None

    @property
    def name(self) -> str:
        return " + ".join(judge.name for judge in self.judges)


class Court:
    """Judges with one cache and one bill, for any number of hearings; to be used in a `with`."""

    def __init__(self, asking: Asking, markers: Markers) -> None:
        self.asking, self.bill, self.judges = asking, asking.bill(), asking.judges(markers)
        self.files, self.cache = contextlib.ExitStack(), None

    def __enter__(self) -> Self:
        if self.asking.cache:
            self.cache = VerdictCache(self.asking.cache)
            self.files.callback(self.cache.close)
            if self.cache.torn:
                notice(f"--cache: {self.cache.torn} lines of {self.cache.path} are torn; what they said is asked again")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.files.close()

    def hear(self, comparisons: Sequence[Comparison], names: tuple[str, str], save_csv: str | Path = "",
             stopping: "Stopping | None" = None) -> Heard:
        """The judges' verdicts on all, or until `stopping` has seen enough. names: of candidate and baseline.

        save_csv: a file with a row a request; A is shown first, under the first label, and gpt4_choice is a label.
        """
        table = Table(save_csv, self.asking.reason, len(self.judges) > 1)
        orders = [1 if judge.order_blind else self.asking.orders for judge in self.judges]
        by_judge, cached = list[list[Verdict]](), 0
        with contextlib.closing(table.file):
            for judge, times in zip(self.judges, orders, strict=True):
                hearing = Hearing(comparisons, judge, times, names, table, self.asking.verbose, stopping)
                cached += self._ask(hearing)
                by_judge.append(hearing.given)
        together = by_judge[0] if len(by_judge) == 1 else [
            panel_verdict(verdicts, [judge.name for judge in self.judges])
            for verdicts in zip(*by_judge, strict=True)]
        return Heard(self.judges, by_judge, together, orders, cached, stopping)

    def _ask(self, hearing: Hearing) -> int:
        """Answers known before. Each verdict is written and shown as it comes; if the judge stops, those that it gave
        are told."""
        comparisons = hearing.comparisons
        questions = [question for one in comparisons for question in one.questions(hearing.orders)]
        docket = Docket(hearing.judge, questions, self.cache, self.bill, hearing.take, lambda: hearing.over)
        try:
            if asked := docket.begin():
                hearing.bill = self.bill
                hearing.judge.ask(asked, docket)
        finally:
            hearing.close()
            told = hearing.given
            if len(told) < len(comparisons) and not hearing.over:
                ours, theirs = (sum(verdict.winner == side for verdict in told) for side in ("candidate", "baseline"))
                notice(f"stopped after {len(told)} of {len(comparisons)} comparisons: {hearing.names['candidate']} won "
                       f"{ours}, {hearing.names['baseline']} {theirs}; no result is written")
        return docket.cached


def add_options(add: Callable[..., Any]) -> None:
    """The options of `Asking`. add: a parser's add_argument."""
    add("--judge", "-j", action="append", help=f"a model's name, hf:PATH or rm:PATH ({DEFAULT_JUDGE}); again for more: "
                                               "a panel, which decides by majority")
    add("--labels", "-l", default="12", help="two characters that name the responses to the judge (12)")
    add("--seed", "-s", type=int, default=0, help="for the order of the responses, and the judge's own (0)")
    add("--sleep_time", "-st", type=float,
        help="seconds from the start of a request to the next one's (0.5; 0 where --concurrency is given)")
    add("--verbose", "-v", type=truth, default=False, metavar="true|false", help="show each verdict (false)")
    add("--orders", type=int, default=2, choices=(1, 2), help="ask in both orders, or in a shuffled one (2)")
    add("--concurrency", type=int, help="requests in flight (8)")
    add("--max_tokens", type=int, help="of an endpoint's answer (10; 120 with --reason)")
    add("--cache", default=DEFAULT_CACHE, help=f"file or folder of answers, not asked for again ({DEFAULT_CACHE})")
    add("--no_cache", dest="cache", action="store_const", const=None, help="neither read nor keep answers")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars per million tokens (none)")
    add("--max_requests", type=int, help="stop after so many requests, retries included (none)")
    add("--max_cost", type=float, metavar="DOLLARS", help="stop before more is spent; needs --price (none)")
    add("--template", metavar="FILE", help="a text with {history}, {response_1}, {response_2} (the built-in one)")
    add("--reason", action="store_true", help="ask for a reason after the choice; a column of the CSV")


def taken(options: dict[str, Any]) -> Asking:
    """What the options of `add_options` say; they are taken out of `options`."""
    given = {name: options.pop(name) for name in Asking.__dataclass_fields__}
    return Asking(**{**given, "judge": given["judge"] or DEFAULT_JUDGE})


def require_writable_file(option: str, path: str | Path) -> None:
    """Looked at before anything is paid for. An empty path is no file."""
    target = Path(path)
    reason = None
    if path and target.is_dir():
        reason = "it is a folder"
    elif path and not target.parent.is_dir():
        reason = f"there is no folder {target.parent}"
    elif path and not os.access(target if target.exists() else target.parent, os.W_OK):
        reason = "permission denied"
    if reason:
        raise UserError(f"{option}: cannot write {path}: {reason}")


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}; give true or false")
    return text.lower() == "true"
