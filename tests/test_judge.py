"""Which judge is meant, other runs' markers, and the statistics of verdicts."""

from pathlib import Path
from typing import Any

import pytest
from judged import KEY, PROMPT

from feedback import Markers
from judge import (
    Comparison,
    HuggingFaceJudge,
    OpenAIJudge,
    PromptTemplate,
    RewardModelJudge,
    Verdict,
    make_judge,
    summarise,
)
from utils import UserError

CHATML = Markers("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n")
Patch = pytest.MonkeyPatch


def test_turns_are_rewritten_in_other_markers_and_back() -> None:
    chatml = ("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
              "<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n")
    assert Markers().rewrite_prompt(PROMPT, CHATML) == chatml
    assert CHATML.rewrite_prompt(chatml, Markers()) == PROMPT
    assert Markers().rewrite_prompt("System." + PROMPT, CHATML) == "System." + chatml
    assert CHATML.rewrite_response("Yes.<|im_end|>\n", Markers()) == "Yes."


def test_markers_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match="two different texts"):
        Markers("", "", "", "").turns("Hi")


def test_the_prefix_chooses_the_judge(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    specs = ("gpt-4-0613", "ft:gpt-4:us::1", f"rm:{tmp_path}", f"hf:{tmp_path}", "hf:a/b")
    assert [type(make_judge(spec)) for spec in specs] == [
        OpenAIJudge, OpenAIJudge, RewardModelJudge, HuggingFaceJudge, HuggingFaceJudge]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert make_judge("llama3:8b").name == "llama3:8b"


@pytest.mark.parametrize(("options", "expected"), [
    ({}, (0.5, 8)), ({"concurrency": 64}, (0.0, 64)), ({"sleep_time": 0.1}, (0.1, 8)),
    ({"sleep_time": 0.1, "concurrency": 64}, (0.1, 64)), ({"sleep_time": 0.0}, (0.0, 8))])
def test_requests_are_half_a_second_apart_unless_concurrency_is_given(monkeypatch: Patch, options: Any,
                                                                     expected: tuple[float, int]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = make_judge("a-model", **options)
    assert isinstance(judge, OpenAIJudge) and (judge.sleep_time, judge.concurrency) == expected


def test_reward_models_and_local_models_give_no_reasons(tmp_path: Path) -> None:
    for kind in ("rm", "hf"):
        with pytest.raises(UserError, match=f"--reason: --judge {kind}:"):
            make_judge(f"{kind}:{tmp_path}", PromptTemplate(reason=True))


@pytest.mark.parametrize("spec", [
    "", "rm:", "rm:/no/such", "hf:", "hf:/no/such", "RM:/no/such", "xx:/no/such", "xx:name"])
def test_a_judge_that_is_not_there_is_an_error_that_names_it(monkeypatch: Patch, spec: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=f"--judge.*{spec}"):
        make_judge(spec)


def test_ties_are_half_a_win_and_unparsed_verdicts_nobodys() -> None:
    """2 wins, 1 loss, 1 tie that flipped, 1 unparsed, which is left out: (2 + 1/2) / 4 = 0.625.

    The sign test has 2 wins and 1 loss, 2 (1 + 3) / 2^3 = 1; lengths tell nothing, all alike: of the 4 verdicts that
    were read and the prior's tie, (2 + 1/2 + 1/2) / 5 = 0.6.
    """
    verdicts = [Verdict("candidate", flipped=False)] * 2 + [
        Verdict("baseline"), Verdict(None, why="tie", flipped=True), Verdict(None, why="unparsed")]
    summary = summarise(asked(5), verdicts, [[3] * 5, [3] * 5])
    assert (summary.total, summary.candidate_wins, summary.baseline_wins) == (5, 2, 1)
    assert (summary.ties, summary.unparsed, summary.flips, summary.win_rate) == (1, 1, 1, 0.625)
    assert summary.p_value == 1 and summary.controlled is not None
    assert summary.controlled.win_rate == pytest.approx(0.6)
    assert summarise(asked(1), [Verdict("baseline")], [[3], [4]]).flips is None


def asked(n: int, prompts: int = 10**6) -> list[Comparison]:
    return [Comparison(f"prompt {number % prompts}", "yes", "no") for number in range(n)]


def test_comparisons_of_one_prompt_count_as_less_than_as_many_prompts() -> None:
    """40 verdicts on 4 prompts, each all won or all lost, tell about as much as 4."""
    verdicts = [Verdict("candidate" if number % 4 < 2 else "baseline") for number in range(40)]
    lengths = [[3] * 40, [3] * 40]
    apart, together = (summarise(asked(40, prompts), verdicts, lengths).interval for prompts in (40, 4))
    assert apart[1] - apart[0] < 0.31 and together[1] - together[0] > 0.6


def test_where_no_verdict_could_be_read_nothing_is_said_of_lengths() -> None:
    summary = summarise(asked(2), [Verdict(None, why="unparsed")] * 2, [[3, 4], [5, 6]])
    assert summary.controlled is None and summary.p_value == 1 and summary.win_rate is None
    assert summary.interval == (0.0, 1.0)
