"""Answers of a judge as they come: put into verdicts, shown, and written to the file of judgments."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from docket import Bill, Judge
from verdicts import Answer, Comparison, Reading, Verdict

if TYPE_CHECKING:
    from anytime import Stopping


class Table:
    """The file of judgments, each row on disk as it comes; an empty path is no file."""

    def __init__(self, path: str | Path, reason: bool = False, panel: bool = False) -> None:
        self.file = open(path or os.devnull, "w", newline="", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.writer, self.reason, self.panel = csv.writer(self.file), reason, panel
        self.writerow(["input", "src_A", "src_B", "response_A", "response_B", "gpt4_choice"], "reason", "judge")

    def writerow(self, row: Sequence[str], reason: str, judge: str) -> None:
        """The original's columns; the reason where one was asked for, the judge where there are several."""
        self.writer.writerow([*row, *[reason] * self.reason, *[judge] * self.panel])
        self.file.flush()


class Hearing:
    """Answers in whatever order they come, put into verdicts, which are written and shown in the comparisons' order.

    stopping: may end it before all are told; what is answered after that is not counted.
    """

    def __init__(self, comparisons: Sequence[Comparison], judge: Judge, orders: int, names: tuple[str, str],
                 table: Table, verbose: bool, stopping: "Stopping | None" = None) -> None:
        from tqdm import tqdm

        self.comparisons, self.judge, self.orders, self.table, self.verbose = comparisons, judge, orders, table, verbose
        self.stopping, self.over = stopping, False
        self.names = {"candidate": names[0], "baseline": names[1]}
        self.answers: list[dict[int, tuple[Answer, Reading]]] = [{} for _ in comparisons]  # of each order
        self.verdicts: list[Verdict | None] = [None] * len(comparisons)
        self.told = 0  # comparisons that were written and shown
        self.bill: Bill | None = None
        self.bar = tqdm(total=len(comparisons) * orders, desc="judging", delay=1)

    def take(self, number: int, answer: Answer) -> None:
        """number: of a question, of which each comparison has `orders`."""
        place, order = divmod(number, self.orders)
        given = self.answers[place]
        given[order] = answer, self.judge.read(answer.text)
        if len(given) == self.orders:
            answers, readings = zip(*(given[order] for order in range(self.orders)), strict=True)
            text = " | ".join(answer.text for answer in answers)
            self.verdicts[place] = self.comparisons[place].verdict(readings, self.judge.labels, text)
        while self.told < len(self.verdicts) and (verdict := self.verdicts[self.told]) and not self.over:
            self.tell(self.told)
            if self.stopping:
                self.stopping.add(self.told, verdict.score)
                self.over = bool(self.stopping.why)
            self.told += 1
        self.bar.update()
        if self.bill:
            cost = "" if self.bill.cost is None else f"${self.bill.cost:.2f}, "
            self.bar.set_postfix_str(f"{cost}{self.bill.retries} retries", refresh=False)

    def tell(self, place: int) -> None:
        comparison, verdict = self.comparisons[place], self.verdicts[place]
        assert verdict
        for order, (sides, question) in enumerate(zip(comparison.sides(self.orders), comparison.questions(self.orders),
                                                      strict=True)):
            shown = [self.names[side] for side in sides]
            self.table.writerow([comparison.prompt, *shown, *question.responses, verdict.choices[order] or ""],
                                verdict.reasons[order], self.judge.name)
            if self.verbose:
                answer, _ = self.answers[place][order]
                self.bar.write(f"{comparison.prompt}\n[{shown[0]}] {question.responses[0]}\n[{shown[1]}] "
                               f"{question.responses[1]}\n-> {answer.text}\n")
        if self.verbose:
            self.bar.write(f"=> {verdict.winner or verdict.why}{', by the order' if verdict.flipped else ''}: "
                           f"{verdict.text}\n")

    def close(self) -> None:
        """Tell what was judged after the first gap, too, if it did not end before that."""
        for place in range(self.told, len(self.verdicts) if not self.over else 0):
            if self.verdicts[place]:
                self.tell(place)
        self.bar.close()

    @property
    def given(self) -> list[Verdict]:
        """The verdicts that count."""
        return [verdict for verdict in self.verdicts[:self.told if self.over else None] if verdict]
