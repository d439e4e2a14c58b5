"""The questions of a run on their way to a judge: each asked once, each answer kept at once, and what it all costs."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from utils import UserError
from verdict_cache import VerdictCache, key_of
from verdicts import Answer, Question, Reading

BYTES_A_TOKEN = 4.0  # of English, until the endpoint has said how many tokens a request had


class Judge(Protocol):
    """order_blind: it scores each response by itself, so that to ask in both orders would tell nothing."""

    order_blind: bool

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> str: ...

    def identity(self, question: Question) -> Any:
        """All that the answer depends on, as JSON: the judge's name and place, its settings, what is shown to it."""

    def ask(self, questions: Sequence[Question], docket: "Docket") -> None:
        """Call `docket.take(number, answer)` for every question, in any order, each as soon as it is answered."""

    def read(self, text: str) -> Reading: ...


@dataclass
class Bill:
    """What was asked of an endpoint in this run, and what may be.

    price: dollars per million tokens, in and out. Money is that of the tokens that the endpoint counted; a request
    that may have been charged for without an answer is taken at its estimate.
    """

    price: tuple[float, float] | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncertain: float = 0.0  # dollars of requests that were lost on the way
    reserved: float = 0.0  # dollars of those in flight
    bytes_in: int = 0  # of the requests whose tokens are known

    def __post_init__(self) -> None:
        if self.price is not None and not all(0 <= one < math.inf for one in self.price):
            raise UserError(f"--price: got {self.price}; give dollars per million tokens, in and out: --price 30 60")
        if self.max_requests is not None and self.max_requests < 0:
            raise UserError(f"--max_requests: got {self.max_requests}; give 0 or more, or leave it out")
        if self.max_cost is not None and not self.max_cost >= 0:
            raise UserError(f"--max_cost: got {self.max_cost}; give dollars, 0 or more, or leave it out")
        if self.max_cost is not None and self.price is None:
            raise UserError("--max_cost: needs --price IN OUT, the dollars per million tokens")

    @property
    def cost(self) -> float | None:
        """Dollars; None without a price."""
        return None if self.price is None else self.dollars(self.tokens_in, self.tokens_out) + self.uncertain

    def dollars(self, tokens_in: float, tokens_out: float) -> float:
        price = self.price or (0.0, 0.0)
        return (tokens_in * price[0] + tokens_out * price[1]) / 1e6

    def tokens(self, size: int) -> float:
        """About how many tokens a request of so many bytes has, by those that were counted."""
        return size * self.tokens_in / self.bytes_in if self.bytes_in and self.tokens_in else size / BYTES_A_TOKEN

    def limit_before(self, estimate: float) -> str:
        """Which limit another request of about so many dollars would break; empty: none."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            return f"--max_requests {self.max_requests} is reached"
        if self.max_cost is not None and (self.cost or 0) + self.reserved + estimate > self.max_cost:
            return f"--max_cost {self.max_cost:g} would be passed: ${self.cost:.4f} are spent"
        return ""

    def start(self, estimate: float, again: bool) -> None:
        self.requests += 1
        self.retries += again
        self.reserved += estimate

    def settle(self, estimate: float, answer: Answer | None, size: int = 0, charged: bool = True) -> None:
        """Close a request. answer: None where none came; charged: it may cost all the same."""
        self.reserved -= estimate
        if answer and answer.tokens_in:
            self.tokens_in += answer.tokens_in
            self.tokens_out += answer.tokens_out
            self.bytes_in += size
        elif charged:
            self.uncertain += estimate

    def since(self, before: "Bill") -> "Bill":
        """What was asked and paid after `before`, a copy of this bill."""
        counted = ("requests", "retries", "tokens_in", "tokens_out", "uncertain")
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counted})

    def facts(self) -> dict[str, Any]:
        facts = {"requests": self.requests, "retries": self.retries,
                 "tokens": {"in": self.tokens_in, "out": self.tokens_out}}
        return facts if self.cost is None else {**facts, "cost": round(self.cost, 6)}


class Docket:
    """What is asked, by number, and what was answered.

    Questions that come to the same are asked once. `show(number, answer)` is called for each of `questions`: for those
    that the cache has at the start by `begin`, for the others as they are answered. over: whether enough was answered.
    """

    def __init__(self, judge: Judge, questions: Sequence[Question], cache: VerdictCache | None, bill: Bill,
                 show: Callable[[int, Answer], None], over: Callable[[], bool] = lambda: False) -> None:
        self.judge, self.cache, self.bill, self.show, self.over = judge, cache, bill, show, over
        self.questions = questions
        self.places: dict[str, list[int]] = defaultdict(list)  # key -> its numbers in `questions`
        for number, question in enumerate(questions):
            self.places[key_of(judge.identity(question))].append(number)
        self.keys: list[str] = []  # of what is to be asked
        self.cached = 0

    def begin(self) -> list[Question]:
        """Show what is known, and return what is to be asked: `take` and `state` are given a number in this list."""
        for key, places in self.places.items():
            if self.over():
                return []
            if self.cache and key in self.cache.answers:
                self.cached += len(places)
                self._show(key, self.cache.answers[key])
            else:
                self.cached += len(places) - 1  # asked once, it is known for the others
                self.keys.append(key)
        return [self.questions[self.places[key][0]] for key in self.keys]

    def _show(self, key: str, answer: Answer) -> None:
        for place in self.places[key]:
            self.show(place, answer)

    def state(self, number: int) -> Literal["ask", "wait", "known"]:
        """Whether to ask this now, to come back later since another run is asking it, or neither: it has answered, or
        enough is known."""
        if self.over():
            return "known"
        if self.cache is None:
            return "ask"
        key = self.keys[number]
        claimed = self.cache.claim(key)
        self.cache.refresh()  # after the claim: who had it before has added its answer
        if key in self.cache.answers:
            self.cached += 1
            self._show(key, self.cache.answers[key])
            self.cache.give_up(key)
            return "known"
        return "ask" if claimed else "wait"

    def take(self, number: int, answer: Answer) -> None:
        """Keep an answer, then show it."""
        key = self.keys[number]
        if self.cache:
            self.cache.add(key, answer, self.judge.name)
        self._show(key, answer)
