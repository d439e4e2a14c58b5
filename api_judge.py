"""A judge behind an OpenAI-compatible endpoint: many requests at once, its limits obeyed, its failures survived."""

import asyncio
import contextlib
import math
import os
import random
import sys
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from docket import Docket
from replies import Failure, answer_of
from templates import PromptTemplate
from utils import UserError
from verdicts import Answer, Question, Reading

MAX_TOKENS, MAX_TOKENS_REASON = 10, 120
SHORTEST_SECRET = 8  # characters; a shorter key is a placeholder ("none"), and may well stand in an answer


class OpenAIJudge:
    """A chat model of OpenAI or, with OPENAI_BASE_URL, of any endpoint like it; OPENAI_API_KEY must be set.

    concurrency: requests in flight. sleep_time: seconds from the start of one to the start of the next. Rate limits,
    server errors, timeouts, lost connections and answers that are none are tried again, `tries` times, after what
    Retry-After says (it holds for all requests) or else after twice as long each time, from `backoff` seconds on;
    other refusals stop at once. timeout: seconds for a whole answer, however it drips. max_tokens: of an answer (None:
    10, or 120 with a reason). What settings the model does not take, as newer ones of OpenAI, it is asked without.
    """

    order_blind = False
    longest_wait = 600.0  # seconds; who asks for more than that will not be ready soon
    longest_backoff = 60.0
    tries_empty = 3  # of a question to which completions without any choice come; they are charged for

    def __init__(self, model: str, template: PromptTemplate | None = None, seed: int = 0, sleep_time: float = 0.5,
                 concurrency: int = 8, tries: int = 8, timeout: float = 60.0, backoff: float = 1.0,
                 max_tokens: int | None = None,
                 run: Callable[[Coroutine[Any, Any, None]], None] | None = None) -> None:
        if concurrency < 1:
            raise UserError(f"--concurrency: got {concurrency}; give 1 or more requests")
        if not (math.isfinite(sleep_time) and sleep_time >= 0):
            raise UserError(f"--sleep_time: got {sleep_time}; give 0 or more seconds")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"--max_tokens: got {max_tokens}; give 1 or more, or leave it out")
        self.name, self.template, self.seed = model, template or PromptTemplate(), seed
        self.sleep_time, self.concurrency = sleep_time, concurrency
        self.tries, self.timeout, self.backoff = tries, timeout, backoff
        self.run = run or in_a_loop
        self.max_tokens = max_tokens or (MAX_TOKENS_REASON if self.template.reason else MAX_TOKENS)
        self.refused: set[str] = set()  # settings that the model does not take
        self.secret = api_key()
        self.base_url = base_url()

    @property
    def labels(self) -> str:
        return self.template.labels

    @property
    def endpoint(self) -> str:
        """The address without a user's name, password or query, which may be secret."""
        parts = urllib.parse.urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def messages(self, question: Question) -> list[dict[str, str]]:
        return self.template.messages(question.prompt, question.responses)

    def identity(self, question: Question) -> dict[str, Any]:
        return {"judge": self.name, "endpoint": self.endpoint, "temperature": 0, "max_tokens": self.max_tokens,
                "seed": self.seed, "labels": self.labels, "messages": self.messages(question)}

    def settings(self) -> dict[str, int]:
        """What a request says beside the messages."""
        limit = "max_completion_tokens" if "max_tokens" in self.refused else "max_tokens"
        wanted = {"temperature": 0, limit: self.max_tokens, "seed": self.seed}
        return {name: value for name, value in wanted.items() if name not in self.refused}

    def size(self, question: Question) -> int:
        return sum(len(message["content"].encode(errors="replace")) for message in self.messages(question))

    def read(self, text: str) -> Reading:
        return self.template.read(text)

    def client(self) -> Any:
        import openai

        return openai.AsyncOpenAI(api_key=self.secret, base_url=self.base_url, timeout=self.timeout, max_retries=0)

    def ask(self, questions: Sequence[Question], docket: Docket) -> None:
        notice(self.forecast(questions, docket))
        exchange = Exchange(self, questions, docket)
        self.run(exchange.all())
        if exchange.stopped and not docket.over():
            raise exchange.stopped

    def forecast(self, questions: Sequence[Question], docket: Docket) -> str:
        """What is to come: requests, tokens (by their bytes), dollars at most, and the least time."""
        n, bill = len(questions), docket.bill
        tokens = sum(bill.tokens(self.size(question)) for question in questions)
        cost = f", some ${bill.dollars(tokens, n * self.max_tokens):.2f}" if bill.price else ""
        return (f"judge {self.name} at {self.endpoint}: {n} requests to send ({docket.cached} answers are known), some "
                f"{tokens:.0f} tokens in and {n * self.max_tokens} out at most{cost}; {self.concurrency} in flight, "
                f"{self.sleep_time:g} s apart: at least {(n - 1) * self.sleep_time:.0f} s")

    def clean(self, text: str) -> str:
        """The text without the key: some servers repeat it."""
        if len(self.secret) < SHORTEST_SECRET:
            return text
        return text.replace(self.secret, "***").replace(urllib.parse.quote(self.secret, safe=""), "***")


class Exchange:
    """The requests of one `ask`. A question that must wait holds no place: others are asked meanwhile."""

    def __init__(self, judge: OpenAIJudge, questions: Sequence[Question], docket: Docket) -> None:
        self.judge, self.questions, self.docket, self.bill = judge, questions, docket, docket.bill
        self.jitter = random.Random(judge.seed)
        self.failures, self.empties = [0] * len(questions), [0] * len(questions)
        self.answered = 0
        self.seen = [-1] * len(questions)  # how many were answered when the question failed last
        self.open = len(questions)
        self.in_flight = 0
        self.next_start, self.paused_until = 0.0, 0.0  # by the loop's clock
        self.said: set[str] = set()
        self.stopped: Exception | None = None

    async def all(self) -> None:
        """Until every question is answered or one stops it; what is in flight by then is still waited for and kept."""
        self.line: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()  # the first of those that wait comes first
        self.over, self.gate, self.loop = asyncio.Event(), asyncio.Lock(), asyncio.get_running_loop()
        for number in range(len(self.questions)):
            self.line.put_nowait(number)
        async with self.judge.client() as self.client:
            workers = [asyncio.ensure_future(self.work()) for _ in range(min(self.judge.concurrency, self.open))]
            together = asyncio.gather(*workers)
            try:
                await asyncio.shield(together)
            except asyncio.CancelledError:
                self.end()
                if self.in_flight:
                    notice(f"waiting for {self.in_flight} requests in flight, which are paid for; "
                           "Ctrl-C again to stop at once")
                await together
                raise

    def end(self, error: Exception | None = None) -> None:
        """Let nobody start another request."""
        self.stopped = self.stopped or error
        self.over.set()
        for _ in range(self.judge.concurrency):
            self.line.put_nowait(-1)  # before all others

    async def work(self) -> None:
        while not self.over.is_set() and (number := await self.line.get()) >= 0:
            state = self.docket.state(number)
            if state == "wait":
                self.loop.call_later(1.0, self.line.put_nowait, number)
            elif state == "known":
                self.close_one()
            elif await self.may_start():
                await self.request(number)

    async def may_start(self) -> bool:
        """Wait for a turn: `sleep_time` after the one before, and not in a pause; False if it is all over by then."""
        async with self.gate:
            while not self.over.is_set():
                now = self.loop.time()
                wait = max(self.next_start, self.paused_until) - now
                if wait <= 0:
                    self.next_start = now + self.judge.sleep_time
                    return True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.over.wait(), wait)
        return False

    async def request(self, number: int) -> None:
        """Ask once, and settle what came: an answer, another try later, or the end."""
        question = self.questions[number]
        size = self.judge.size(question)
        estimate = self.bill.dollars(self.bill.tokens(size), self.judge.max_tokens)
        if limit := self.bill.limit_before(estimate):
            return self.end(UserError(f"{limit}; what was answered is in the cache, and the same command goes on"))
        self.bill.start(estimate, again=self.failures[number] > 0)
        self.in_flight += 1
        outcome = await self.send(question, settings := self.judge.settings())
        self.in_flight -= 1
        if isinstance(outcome, Answer):
            self.bill.settle(estimate, outcome, size)
            self.close_one(number, outcome)
        else:
            self.bill.settle(estimate, None, charged=outcome.charged)
            if outcome.unsupported in settings:
                self.do_without(number, outcome)
            else:
                self.fail(number, outcome)

    def close_one(self, number: int | None = None, answer: Answer | None = None) -> None:
        """A question is done with; answer: None where another run has asked it."""
        if number is not None and answer is not None:
            self.answered += 1
            try:
                self.docket.take(number, answer)
            except (UserError, OSError) as error:  # a disk that is full
                return self.end(error)
        self.open -= 1
        if not self.open or self.docket.over():
            self.end()

    async def send(self, question: Question, settings: dict[str, int]) -> Answer | Failure:
        import openai

        try:
            async with asyncio.timeout(self.judge.timeout):
                completion = await self.client.chat.completions.create(
                    model=self.judge.name, messages=self.judge.messages(question), **settings)
            answer = answer_of(completion)
            return answer._replace(text=self.judge.clean(answer.text))
        except (openai.APIError, ValueError, TimeoutError) as error:  # ValueError: status 200, but not a completion
            return Failure(error, self.judge.clean(f"{type(error).__name__}: {error.__cause__ or error}"))

    def do_without(self, number: int, failure: Failure) -> None:
        """Ask again, at once, without a setting that the model does not take."""
        name, judge = failure.unsupported, self.judge
        judge.refused.add(name)
        instead = {"temperature": "at its own temperature, so that answers may differ from time to time",
                   "max_tokens": f"with max_completion_tokens {judge.max_tokens}; what thinks before it answers needs "
                                 "more: --max_tokens 2000"}.get(name, "without it")
        self.say(f"judge {judge.name}: takes no {name}; asked {instead}", f"no {name}")
        self.line.put_nowait(number)

    def fail(self, number: int, failure: Failure) -> None:
        """Put the question back in the line, later; or, where that cannot help, end it all."""
        self.failures[number] += 1
        self.empties[number] += failure.empty
        failures, judge = self.failures[number], self.judge
        backoff = min(judge.longest_backoff, judge.backoff * 2.0 ** (failures - 1)) * self.jitter.uniform(0.5, 1.0)
        wait = backoff if failure.asked is None else failure.asked
        # Who is told to slow down while others are answered is not at its end.
        tried_out = failures >= judge.tries and not (failure.slow_down and self.answered > self.seen[number])
        self.seen[number] = self.answered
        if failure.of_this_question or (failure.empty and self.empties[number] >= judge.tries_empty):
            self.say(f"judge {judge.name}: {failure.reason}; no verdict on this question")
            self.close_one(number, Answer(failure.reason if failure.of_this_question else ""))
        elif failure.final or wait > judge.longest_wait or tried_out:
            host = urllib.parse.urlsplit(judge.endpoint).hostname
            self.end(UserError(f"judge {judge.name} at {host} failed for good, at try {failures} of {judge.tries}: "
                               f"{failure.reason}; look at OPENAI_API_KEY, OPENAI_BASE_URL and --judge"))
        elif not self.over.is_set():
            if failure.asked is not None:
                self.paused_until = max(self.paused_until, self.loop.time() + wait)
            self.loop.call_later(wait, self.line.put_nowait, number)
            self.say(f"judge {judge.name}: {failure.reason}; trying again in {wait:.1f} s (try {failures + 1} of "
                     f"{judge.tries}); the next of this kind are only counted", failure.kind)

    def say(self, text: str, kind: str = "") -> None:
        if (kind or text) not in self.said:
            self.said.add(kind or text)
            notice(text)


def api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError("OPENAI_API_KEY is not set; export it (any value, for a local endpoint that asks for none), "
                        "or judge by a local model: --judge hf:PATH or --judge rm:PATH")
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY has characters that no key has (a line break, or not ASCII); export it again")
    return key


def base_url() -> str:
    """Where the endpoint is. What was given is not repeated in a message: a password may be in it."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is none
        whole = False
    if not whole:
        raise UserError("OPENAI_BASE_URL is no address of an endpoint; export one such as http://localhost:8000/v1")
    return url


def in_a_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, in a thread of its own where this one has a loop already, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(partial(asyncio.run, work)).result()


def notice(text: str) -> None:
    """A line on the screen that leaves a progress bar whole."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
