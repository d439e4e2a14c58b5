"""A judge behind an endpoint: a real server on this machine that fails in every way, and a virtual clock for waits."""

import asyncio
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from judged import KEY, PROMPT, serve, verdicts_of

from api_judge import OpenAIJudge
from docket import Bill
from templates import PromptTemplate
from utils import UserError
from verdict_cache import VerdictCache
from verdicts import Comparison, Verdict

# Of benchmarks/, which `judged` puts on the path.
from endpoint import HANG, Endpoint, completion, faults  # isort: skip
from judging import Client, VirtualLoop, fail, simulated  # isort: skip

Patch = pytest.MonkeyPatch


def pairs(n: int) -> list[Comparison]:
    return [Comparison(f"\n<|user|>\n#{i}#\n<|assistant|>\n", "Good.", "Bad.") for i in range(n)]


def ask(monkeypatch: Patch, replies: Any, comparisons: Sequence[Comparison] = (Comparison(PROMPT, "Good.", "Bad."),),
        orders: int = 1, **options: Any) -> tuple[list[Verdict], list[dict[str, Any]], Bill]:
    """The verdicts of an endpoint with these replies, what it was asked, and the bill; waits are a hundredth."""
    bill = options.pop("bill", Bill())
    cache = options.pop("cache", None)
    with Endpoint(replies) as endpoint:
        serve(endpoint, monkeypatch)
        judge = OpenAIJudge("a-model", **{"sleep_time": 0, "backoff": 0.01, "timeout": 5.0, **options})
        verdicts = verdicts_of(judge, comparisons, orders, cache, bill)
    return verdicts, endpoint.requests, bill


class Scripted(Client):
    """Answers each question by a script, after a second of the virtual clock; keeps when each was asked."""

    def __init__(self, script: Callable[[int, int], str]) -> None:
        self.script, self.tries, self.starts = script, Counter[int](), list[tuple[float, int]]()
        self.chat = SimpleNamespace(completions=self)

    async def create(self, *, messages: list[dict[str, str]], **settings: Any) -> Any:
        number = int(messages[0]["content"].split("#")[1])
        self.starts.append((round(asyncio.get_running_loop().time(), 3), number))
        kind = self.script(number, self.tries[number])
        self.tries[number] += 1
        await asyncio.sleep(1)
        if kind:
            return fail(kind)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="Response 1"))], usage=None)


def starts(monkeypatch: Patch, n: int, script: Callable[[int, int], str], **options: Any) -> list[tuple[float, int]]:
    """When, in seconds, which of n questions was asked. script: (number, try) to a failure, or '' for an answer."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = Scripted(script)

    def run(work: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(work)

    judge = OpenAIJudge("a-model", run=run, **{"sleep_time": 0, **options})
    monkeypatch.setattr(judge, "client", lambda: client)
    assert all(verdict.winner == "candidate" for verdict in verdicts_of(judge, pairs(n)))
    return client.starts


def test_the_request_has_the_settings_of_the_contract(monkeypatch: Patch) -> None:
    verdicts, [request], _ = ask(monkeypatch, ["Response 1"], seed=7)
    messages = request["body"].pop("messages")
    assert request == {"path": "/v1/chat/completions", "key": f"Bearer {KEY}",
                       "body": {"model": "a-model", "temperature": 0, "max_tokens": 10, "seed": 7}}
    assert messages == PromptTemplate().format(PROMPT, ["Good.", "Bad."])
    assert verdicts == [Verdict("candidate", ("1",), "Response 1", reasons=("",))]


def test_a_reason_has_more_tokens(monkeypatch: Patch) -> None:
    [verdict], [request], _ = ask(monkeypatch, ["Response 2. It is kind."], template=PromptTemplate(reason=True))
    assert request["body"]["max_tokens"] == 120 and verdict.reasons == ("It is kind.",)


def newer(request: dict[str, Any]) -> Any:
    """As OpenAI's newer models: no max_tokens, no temperature but their own."""
    if "max_tokens" in request["body"]:
        return 400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                                          "'max_completion_tokens' instead.", "code": "unsupported_parameter"}}
    if "temperature" in request["body"]:
        return 400, {"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model. Only "
                                          "the default (1) value is supported.", "code": "unsupported_value"}}
    return "Response 1"


def test_a_model_is_asked_without_settings_that_it_does_not_take(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
                                                                 ) -> None:
    """Each refusal costs a request, of those in flight; from then on all are asked as it likes."""
    verdicts, requests, bill = ask(monkeypatch, newer, pairs(5), concurrency=1, tries=1, max_tokens=2000)
    assert len(verdicts) == 5 and len(requests) == bill.requests == 7 and bill.retries == 0
    assert {key: value for key, value in requests[-1]["body"].items() if key != "messages"} == {
        "model": "a-model", "max_completion_tokens": 2000, "seed": 0}
    said = capsys.readouterr().err
    assert said.count("takes no max_tokens; asked with max_completion_tokens 2000") == 1
    assert said.count("takes no temperature; asked at its own temperature") == 1
    assert len(ask(monkeypatch, newer, pairs(20), concurrency=8)[0]) == 20


def test_a_model_that_refuses_what_it_was_not_asked_for_is_given_up(monkeypatch: Patch) -> None:
    refusal = 400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported", "code": None}}
    with pytest.raises(UserError, match="failed for good, at try 1"):
        ask(monkeypatch, [refusal])


def test_both_orders_are_two_requests_and_a_judge_that_likes_a_place_makes_ties(monkeypatch: Patch) -> None:
    [verdict], requests, _ = ask(monkeypatch, ["Response 1"], orders=2)
    questions = [request["body"]["messages"][1]["content"] for request in requests]
    assert sorted("Response 1: Bad." in question for question in questions) == [False, True]
    assert (verdict.why, verdict.flipped, verdict.choices) == ("tie", True, ("1", "1"))


def test_as_many_requests_as_asked_for_are_in_flight_and_verdicts_keep_the_order(monkeypatch: Patch) -> None:
    """The first question is answered last: its answer drips; each names the label of its number's parity."""
    def reply(request: dict[str, Any]) -> Any:
        number = int(request["body"]["messages"][0]["content"].split("#")[1])
        return faults(drip=0.002)["slow drip"] if number == 0 else f"Response {number % 2 + 1}"

    with Endpoint(reply, delay=0.05) as endpoint:
        serve(endpoint, monkeypatch)
        verdicts = verdicts_of(OpenAIJudge("a-model", sleep_time=0, concurrency=6), pairs(20))
    assert endpoint.most_in_flight == 6 and len(endpoint.requests) == 20
    assert [verdict.winner for verdict in verdicts] == ["candidate", "baseline"] * 10


def test_requests_start_as_far_apart_as_asked_for(monkeypatch: Patch) -> None:
    """Answers take 1 s; with 2 in flight the third waits for one of them."""
    assert starts(monkeypatch, 4, lambda number, again: "", sleep_time=0.25) == [
        (0, 0), (0.25, 1), (0.5, 2), (0.75, 3)]
    assert starts(monkeypatch, 4, lambda number, again: "", sleep_time=0.25, concurrency=2) == [
        (0, 0), (0.25, 1), (1, 2), (1.25, 3)]


def test_what_retry_after_says_holds_for_all_requests(monkeypatch: Patch) -> None:
    """Two at a time: question 0 is told at 1 s to wait 1 s, so that nobody starts
    until 2 s."""
    asked = starts(monkeypatch, 4, lambda number, again: "429 with Retry-After" if (number, again) == (0, 0) else "",
                   concurrency=2)
    assert [start for start, _ in asked] == [0, 0, 2, 2, 3]


def test_a_question_that_waits_lets_others_pass_and_waits_twice_as_long_each_time(monkeypatch: Patch) -> None:
    """Question 0 fails 3 times, at 1 s and after; its waits are 1, 2 and 4 s times 0.5 to 1. Question 1 and 2 are
    asked as soon as the only place is free."""
    asked = starts(monkeypatch, 3, lambda number, again: "500" if number == 0 and again < 3 else "", concurrency=1)
    first = [start for start, number in asked if number == 0]
    waits = [later - earlier - 1 for earlier, later in itertools.pairwise(first)]
    assert len(first) == 4 and 1.0 <= waits[1] <= 2.0 and 2.0 <= waits[2] <= 4.0
    assert [start for start, number in asked if number == 1] == [1.0]


def test_who_is_told_to_slow_down_is_not_given_up_while_others_are_answered(monkeypatch: Patch) -> None:
    """Question 0 is told so 5 times, which is more than its 3 tries; meanwhile 60 others are answered, one a second."""
    asked = starts(monkeypatch, 61, lambda number, again: "429" if number == 0 and again < 5 else "", concurrency=1,
                   tries=3)
    assert sum(number == 0 for _, number in asked) == 6


@pytest.mark.parametrize("kind", list(faults()))
def test_a_failure_that_may_pass_is_tried_again(monkeypatch: Patch, kind: str, tmp_path: Path) -> None:
    """The second request is answered. What never ends is given up after 0.4 s."""
    [verdict], requests, bill = ask(monkeypatch, [faults(drip=0.05)[kind], "Response 2"], timeout=0.4)
    assert verdict.winner == "baseline" and len(requests) == bill.requests == 2 and bill.retries == 1


@pytest.mark.parametrize("reply", [
    "As an AI, I cannot choose.", "Response 7", (200, {"choices": [{"message": {"content": None}}]}),
    (200, {"choices": [{"message": None}]})])
def test_an_answer_without_a_verdict_is_nobodys_win(monkeypatch: Patch, reply: Any) -> None:
    [verdict], requests, _ = ask(monkeypatch, [reply])
    assert (verdict.winner, verdict.choices, verdict.why, len(requests)) == (None, (None,), "unparsed", 1)


def test_no_choices_three_times_are_no_verdict(monkeypatch: Patch) -> None:
    """Other failures do not count."""
    [verdict], requests, _ = ask(monkeypatch, [(500, "boom"), (200, {"choices": []})])
    assert verdict.why == "unparsed" and len(requests) == 4


@pytest.mark.parametrize("error", [
    {"message": "too long", "code": "context_length_exceeded"}, {"message": "filtered", "code": "content_filter"},
    {"message": "This model's maximum context length is 4096 tokens", "code": 400}])
def test_a_question_that_the_endpoint_cannot_take_is_unparsed_and_the_others_go_on(monkeypatch: Patch, error: Any
                                                                                   ) -> None:
    verdicts, requests, _ = ask(monkeypatch, [(400, {"error": error}), "Response 1"], pairs(3), concurrency=1)
    assert [verdict.why for verdict in verdicts] == ["unparsed", "", ""] and len(requests) == 3


@pytest.mark.parametrize(("status", "code"), [
    (400, None), (401, None), (403, None), (404, None), (429, "insufficient_quota")])
def test_a_refusal_stops_at_once_and_never_shows_the_key(monkeypatch: Patch, capsys: pytest.CaptureFixture[str],
                                                         tmp_path: Path, status: int, code: Any) -> None:
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(UserError, match=f"try 1 of 8: .*{status} - no, [*]{{3}} is wrong") as error:
        ask(monkeypatch, [(status, {"error": {"message": f"no, {KEY} is wrong", "code": code}})], pairs(20),
            concurrency=1, cache=cache)
    assert KEY not in str(error.getrepr(showlocals=False, style="long")) and error.value.__context__ is None
    assert KEY not in "".join(capsys.readouterr()) + cache.read_text()


def test_a_refused_key_is_tried_no_more_than_there_are_requests_in_flight(monkeypatch: Patch) -> None:
    with Endpoint([(401, {"error": {"message": "no"}})]) as endpoint:
        serve(endpoint, monkeypatch)
        with pytest.raises(UserError, match="failed for good"):
            verdicts_of(OpenAIJudge("a-model", sleep_time=0, concurrency=4), pairs(50))
    assert len(endpoint.requests) <= 4


@pytest.mark.parametrize("reply", [
    f"Response 1. Your key is {KEY}", (500, f"boom {KEY}"), (429, {"error": {"message": KEY}}, {"Retry-After": "0"}),
    (200, f"<html>{KEY}</html>")])
def test_the_key_is_nowhere_to_be_found_where_the_server_repeats_it(
        monkeypatch: Patch, capsys: pytest.CaptureFixture[str], tmp_path: Path, reply: Any) -> None:
    [verdict], _, _ = ask(monkeypatch, [reply, "Response 1"], cache=tmp_path / "cache.jsonl")
    screen = "".join(capsys.readouterr())
    assert KEY not in verdict.text + screen + (tmp_path / "cache.jsonl").read_text()
    assert "***" in verdict.text + screen or reply[0] == 500  # of which the library shows no text


def test_a_key_that_is_a_placeholder_may_stand_in_an_answer(monkeypatch: Patch) -> None:
    with Endpoint(["Response 1"]) as endpoint:
        serve(endpoint, monkeypatch, key="1")
        [verdict] = verdicts_of(OpenAIJudge("a-model"), pairs(1))
    assert verdict.text == "Response 1"


@pytest.mark.parametrize("url", ["me:secret@host:8000/v1", "host/v1", "ftp://me:secret@host/v1", "http:///v1",
                                 "http://me:secret@[host/v1", "http://me:secret@host:99999/v1"])
def test_an_address_that_is_none_is_told_at_once_and_not_repeated(monkeypatch: Patch, url: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match="OPENAI_BASE_URL is no address") as told:
        OpenAIJudge("a-model")
    assert "secret" not in str(told.value)


def test_a_password_in_the_address_is_neither_in_the_key_of_the_cache_nor_shown(monkeypatch: Patch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:secret@host:8000/v1/?token=abc")
    assert OpenAIJudge("a-model").endpoint == "https://host:8000/v1"


@pytest.mark.parametrize("reply", [
    (503, "busy"), (200, "<html>a login page</html>"), (200, {"error": {"message": "busy"}})])
def test_the_judge_gives_up_after_so_many_tries(monkeypatch: Patch, reply: Any) -> None:
    with pytest.raises(UserError, match=r"judge a-model at 127\.0\.0\.1 failed for good, at try 3 of 3"):
        ask(monkeypatch, [reply], tries=3)


def test_an_endpoint_that_asks_for_an_hour_is_not_waited_for(monkeypatch: Patch) -> None:
    with pytest.raises(UserError, match="try 1 of 8"):
        ask(monkeypatch, [(429, {}, {"Retry-After": "3600"})])


def test_an_endpoint_that_is_not_there_is_said(monkeypatch: Patch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match="at try 2 of 2: APIConnectionError"):
        verdicts_of(OpenAIJudge("a-model", tries=2, backoff=0.01), pairs(1))


@pytest.mark.parametrize("key", ["", " \n", "sk-\u00e9", "sk\nx"])
def test_a_missing_or_broken_key_is_an_error_before_any_request(monkeypatch: Patch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        OpenAIJudge("a-model")
    assert not key.strip() or key not in str(error.value)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"sleep_time": -1}, {"sleep_time": float("nan")}])
def test_settings_that_mean_nothing_are_refused(monkeypatch: Patch, options: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=f"--{next(iter(options))}: got"):
        OpenAIJudge("a-model", **options)


def test_what_is_in_flight_when_another_request_ends_it_all_is_kept(monkeypatch: Patch, tmp_path: Path) -> None:
    """Question 1 is refused while the answer to question 0 drips."""
    def reply(request: dict[str, Any]) -> Any:
        first = "#0#" in request["body"]["messages"][0]["content"]
        return faults(drip=0.002)["slow drip"] if first else (403, {"error": {"message": "no"}})

    cache = tmp_path / "cache.jsonl"
    with pytest.raises(UserError, match="403"):
        ask(monkeypatch, reply, pairs(30), concurrency=2, cache=cache)
    assert len(VerdictCache(cache).answers) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As from a terminal: a shell's background jobs ignore Ctrl-C, and what they start does, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_waits_for_what_is_in_flight_and_keeps_it(monkeypatch: Patch, tmp_path: Path) -> None:
    asked = threading.Event()

    def reply(request: dict[str, Any]) -> Any:
        if not asked.is_set():
            asked.set()
            os.kill(os.getpid(), signal.SIGINT)
        return "Response 1"

    cache = tmp_path / "cache.jsonl"
    with Endpoint(reply, delay=0.05) as endpoint:
        serve(endpoint, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            verdicts_of(OpenAIJudge("a-model", sleep_time=0, concurrency=4), pairs(100), cache=cache)
    assert 0 < len(VerdictCache(cache).answers) == len(endpoint.requests) < 20


def test_a_disk_that_is_full_loses_no_more_than_it_must(monkeypatch: Patch, tmp_path: Path) -> None:
    """The third answer cannot be written: no further request is sent than those in flight."""
    adds = itertools.count()
    add = VerdictCache.add

    def full(self: VerdictCache, *about: Any) -> None:
        if next(adds) == 2:
            raise UserError("--cache: cannot write: No space left on device")
        add(self, *about)

    monkeypatch.setattr(VerdictCache, "add", full)
    cache = tmp_path / "cache.jsonl"
    with Endpoint(["Response 1"], delay=0.02) as endpoint:
        serve(endpoint, monkeypatch)
        with pytest.raises(UserError, match="No space left"):
            verdicts_of(OpenAIJudge("a-model", sleep_time=0, concurrency=4), pairs(50), cache=cache)
    assert len(endpoint.requests) <= 8 and len(VerdictCache(cache).answers) == len(endpoint.requests) - 1


def test_a_judge_can_be_asked_where_a_loop_is_running(monkeypatch: Patch) -> None:
    async def notebook() -> Any:
        return ask(monkeypatch, ["Response 1"])

    [verdict], _, _ = asyncio.run(notebook())
    assert verdict.winner == "candidate"


def test_no_more_requests_are_sent_than_allowed_and_the_next_run_goes_on(monkeypatch: Patch, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    with Endpoint(["Response 1"]) as endpoint:
        serve(endpoint, monkeypatch)
        judge = OpenAIJudge("a-model", sleep_time=0, concurrency=3)
        for sent in (7, 14):
            with pytest.raises(UserError, match="--max_requests 7 is reached"):
                verdicts_of(judge, pairs(20), cache=cache, bill=Bill(max_requests=7))
            assert len(endpoint.requests) == len(VerdictCache(cache).answers) == sent
        assert len(verdicts_of(judge, pairs(20), cache=cache, bill=Bill(max_requests=7))) == 20
    assert len(endpoint.requests) == 20


def test_no_more_is_spent_than_allowed(monkeypatch: Patch, tmp_path: Path) -> None:
    """A request costs 1,000 tokens of $10 and 5 of $20 a million: $0.0101. Of $0.1 nine are $0.0909, and a tenth would
    be too much; the estimates before the first answers are lower, hence one at a time."""
    bill = Bill((10.0, 20.0), max_cost=0.1)
    with pytest.raises(UserError, match=r"--max_cost 0.1 would be passed: \$0.0909 are spent"):
        ask(monkeypatch, [(200, completion("Response 1", (1000, 5)))], pairs(30), bill=bill, concurrency=1,
            cache=tmp_path / "cache.jsonl")
    assert bill.requests == 9 and bill.cost == pytest.approx(9 * 0.0101)
    assert bill.facts() == {"requests": 9, "retries": 0, "tokens": {"in": 9000, "out": 45}, "cost": 0.0909}


def test_a_request_that_may_have_been_charged_for_counts(monkeypatch: Patch) -> None:
    """The first has no answer: its estimate stays on the bill, beside what the second cost."""
    bill = Bill((10.0, 20.0))
    ask(monkeypatch, [HANG, (200, completion("Response 1", (100, 5)))], bill=bill, timeout=0.2)
    assert bill.cost is not None and bill.cost > 1.1e-3 and bill.uncertain > 0


def test_the_forecast_tells_requests_tokens_and_dollars(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """A token is 4 bytes of a question, and an answer has at most 10. At $10,000 and $0 a million tokens, t tokens are
    t / 100 dollars."""
    _, requests, _ = ask(monkeypatch, ["Response 1"], pairs(5), bill=Bill((1e4, 0.0)), sleep_time=0.01)
    size = sum(len(message["content"]) for request in requests for message in request["body"]["messages"])
    assert (f"5 requests to send (0 answers are known), some {size / 4:.0f} tokens in and 50 out at most, some "
            f"${size / 400:.2f}; 8 in flight, 0.01 s apart") in capsys.readouterr().err


@pytest.mark.parametrize("every", [False, True])
def test_failures_of_a_fifth_cost_what_they_must_and_lose_nothing(monkeypatch: Patch, every: bool) -> None:
    """1,000 comparisons in both orders, 64 in flight. every: not only first tries fail, hence 1 / 0.8 = 1.25 requests a
    question in place of 1.2. The schedule that they are held against tries again at once."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    row = simulated(1000, 64, 0.2, every)
    assert (row.questions, row.lost, row.twice) == (2000, 0, 0)
    assert row.requests == row.questions + row.faults
    assert every or row.requests <= 1.2 * row.questions
    assert row.requests <= 1.01 * row.ideal_requests
    assert row.seconds <= 1.2 * row.ideal_seconds
