"""How judges are asked: until enough is known, as a panel, about samples from elsewhere; and what it will take."""

import csv
import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from judged import serve
from test_compare import LongerWins, by_content, elsewhere, prompt, samples, write_samples

import report
from compare import compare_files, main
from judge import Answer, Docket, Question
from outcome import table_of
from utils import UserError
from verdict_cache import VerdictCache

from endpoint import Endpoint, Raw, response  # isort: skip  # of benchmarks/, which `judged` puts on the path

__all__ = ["elsewhere", "samples"]  # fixtures

Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]


def test_it_stops_where_enough_is_known(tmp_path: Path, capsys: Screen) -> None:
    """The policy wins everywhere: 8 to 15 prompts exclude 50% (tests/test_anytime.py). The judge answers backwards, and
    one at a time, so that all questions before the last that counts must be asked; those after it need not be."""
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "longer.") for i in range(100)])
    judges = LongerWins(), LongerWins()
    judges[0].ask = lambda questions, docket: in_order(judges[0], questions, docket)
    results = [compare_files(file, judge, until_width=0.05, cache=tmp_path / "cache") for judge in judges]
    result = results[0]
    assert 8 <= result["total"] <= 15 and len(judges[0].seen) == 2 * result["total"] and not judges[1].seen
    assert result["stopped"] == "the interval excludes 50%" and result["interval"][0] > 0.5 > result["p_value"]
    assert len(result["candidate"]["lengths"]) == result["total"] == result["candidate"]["wins"]
    assert {**result, "date": 0, "cached": 0} == {**results[1], "date": 0, "cached": 0}
    assert f"after {result['total']}: the interval excludes 50%" in table_of(result)
    assert "no result is written" not in capsys.readouterr().err


def in_order(judge: LongerWins, questions: Sequence[Question], docket: Docket) -> None:
    for number, question in enumerate(questions):
        if docket.state(number) == "ask":
            judge.seen.append(question)
            docket.take(number, Answer(" against ".join(question.responses)))


def test_where_it_need_not_stop_all_are_judged_in_random_order(tmp_path: Path) -> None:
    rows = [(prompt(str(i)), "a.", "longer." if i % 2 else ".") for i in range(30)]
    judge, plain = LongerWins(), LongerWins()
    result = compare_files(write_samples(tmp_path / "run.json", rows), judge, until_width=0.0)
    compare_files(tmp_path / "run.json", plain)
    assert (result["total"], result["stopped"], result["win_rate"]) == (30, "all were judged", 0.5)
    assert sorted(judge.seen) == sorted(plain.seen) and judge.seen != plain.seen


def test_where_nothing_can_be_read_there_is_no_win_rate(tmp_path: Path) -> None:
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "") for i in range(3)])
    result = compare_files(file, LongerWins(), until_width=0.05)
    assert (result["win_rate"], result["interval"], result["p_value"], result["unparsed"]) == (None, [0, 1], 1, 3)
    assert "no verdict could be read" in table_of(result)


def test_an_endpoint_is_asked_no_more_than_it_takes(tmp_path: Path, monkeypatch: Patch) -> None:
    """8 in flight may be answered after the last that counts; their answers are kept."""
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "three four five.") for i in range(200)])
    with Endpoint(by_content) as endpoint:
        serve(endpoint, monkeypatch)
        assert main(["-f", str(file), "-r", "r", "--concurrency", "8", "--until-width", "0.1"]) == 0
    result = json.loads((tmp_path / "r").read_text())
    assert 8 <= result["total"] <= 15 and 2 * result["total"] <= len(endpoint.requests) <= 2 * result["total"] + 16
    assert len(VerdictCache(tmp_path / ".cache/verdicts.jsonl").answers) == len(endpoint.requests)


def test_who_waits_for_a_turn_to_ask_does_not_ask_when_enough_is_known(tmp_path: Path, monkeypatch: Patch) -> None:
    """Requests start 30 ms apart and are answered at once: few are in flight, most of the 8 wait for their turn."""
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "three four five.") for i in range(200)])
    with Endpoint(by_content) as endpoint:
        serve(endpoint, monkeypatch)
        command = ["-f", str(file), "-r", "r", "--concurrency", "8", "-st", "0.03", "--until_width", "0.1"]
        assert main(command) == 0
    result = json.loads((tmp_path / "r").read_text())
    assert 2 * result["total"] <= len(endpoint.requests) == result["requests"] <= 2 * result["total"] + 3


def test_a_limit_that_enough_verdicts_are_within_stops_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    """The last that count are in flight when the limit forbids another."""
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "three four five.") for i in range(200)])
    command = ["-f", str(file), "-r", "r", "--no_cache", "--concurrency", "8", "--until_width", "0.1"]
    with Endpoint(by_content, delay=0.02) as endpoint:
        serve(endpoint, monkeypatch)
        assert main(command) == 0
        most = 2 * json.loads((tmp_path / "r").read_text())["total"]
        assert main([*command, "--max_requests", str(most)]) == 0
        assert main([*command, "--max_requests", str(most - 1)]) == 2
    first, second = (json.loads(line) for line in (tmp_path / "r").read_text().splitlines())
    assert first["total"] == second["total"] and second["requests"] == most


def test_what_fails_when_enough_is_known_is_not_said_to_be_tried_again(tmp_path: Path, monkeypatch: Patch,
                                                                      capsys: Screen) -> None:
    """One at a time asks for what counts and no more; of 8 in flight all else fails, slowly."""
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "three four five.") for i in range(200)])
    command = ["-f", str(file), "-r", "r", "--no_cache", "--until_width", "0.1", "--concurrency"]
    counted, failure = list[str](), Raw(response(500, "boom"), drip=0.003)
    with Endpoint(lambda request: counted.append(str(request["body"])) or by_content(request)) as endpoint:
        serve(endpoint, monkeypatch)
        assert main([*command, "1"]) == 0
    with Endpoint(lambda request: by_content(request) if str(request["body"]) in counted else failure) as endpoint:
        serve(endpoint, monkeypatch)
        assert main([*command, "8"]) == 0
    first, second = (json.loads(line) for line in (tmp_path / "r").read_text().splitlines())
    assert first["total"] == second["total"] == len(counted) / 2 and len(endpoint.requests) > len(counted)
    assert "trying again" not in capsys.readouterr().err


def test_a_panel_decides_by_majority_and_says_how_far_its_judges_agree(samples: Path, tmp_path: Path) -> None:
    """By length: won, won, lost, tied, not read. The one that likes "x" flips on "x." against "y z.", the other way
    round it agrees: scores 1, 1/2, 0, 1/2, none. The panel, with twice the first: 1, 1, 0, 1/2, none."""
    judges = [LongerWins(), LongerWins(), LongerWins(likes_first="x")]
    for judge, name in zip(judges, ("first", "second", "third"), strict=True):
        judge.name = name
    result = compare_files(samples, judges, save_csv=tmp_path / "all.csv", report=tmp_path / "out.html")
    assert (result["candidate"]["wins"], result["baseline"]["wins"], result["ties"], result["unparsed"]) == (2, 1, 1, 1)
    assert result["judge"] == "first + second + third" and "flips" not in result
    assert [(part["judge"], part["win_rate"], part["flips"]) for part in result["panel"]] == [
        ("first", 0.625, 0), ("second", 0.625, 0), ("third", 0.5, 1)]
    assert [(pair["judges"], pair["n"]) for pair in result["kappa"]] == [
        (["first", "second"], 4), (["first", "third"], 4), (["second", "third"], 4)]
    kappas = [pair["kappa"] for pair in result["kappa"]]  # 3 of 4 equal; by chance (2 1 + 1 2 + 1 1) / 16 = 5/16
    assert kappas == pytest.approx([1.0, (3 / 4 - 5 / 16) / (1 - 5 / 16), (3 / 4 - 5 / 16) / (1 - 5 / 16)])
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["judge"] for row in csv.DictReader(file)] == ["first"] * 10 + ["second"] * 10 + ["third"] * 10
    page = (tmp_path / "out.html").read_text()
    [data] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert [len(row["verdicts"]) for row in json.loads(data)["rows"]] == [6] * 5 and "By judge" in page
    screen = table_of(result)
    assert "by third alone: 50.0%" in screen and "2 ties (1 by the order), 1 unparsed" in screen
    assert "by first alone: 62.5%" in screen and "kappa of first and third: 0.64 [" in screen


def test_of_several_data_sets_each_has_its_own_win_rate(tmp_path: Path) -> None:
    """hh: won, lost; shp: won, not read, which is left out; of the last the file does not say where it is from."""
    file = write_samples(tmp_path / "run.json", [(prompt("a"), "x", "xx"), (prompt("b"), "xx", "x"),
                                                 (prompt("c"), "x", "xx"), (prompt("d"), "x", ""),
                                                 (prompt("e"), "x", "xx")])
    content = json.loads(file.read_text())
    for sample, name in zip(content["samples"], ("hh", "hh", "shp", "shp", None), strict=True):
        sample["dataset"] = name
    file.write_text(json.dumps(content))
    result = compare_files(file, LongerWins(), report=tmp_path / "out.html")
    assert {name: (part["total"], part["win_rate"]) for name, part in result["datasets"].items()} == {
        "hh": (2, 0.5), "shp": (2, 1.0), "unknown": (1, 1.0)}
    assert "on hh (2): 50.0% [" in table_of(result) and "By data set" in (tmp_path / "out.html").read_text()


def test_outputs_of_alpacaeval_are_samples_of_their_generator(tmp_path: Path) -> None:
    """Matched by instruction, by their place in no file; the reference is `chosen`."""
    for name, rows in {"gpt": [("Hi?", "hello there", None), ("Bye?", "no", None)],
                       "kto": [("Bye?", "nope", "see you"), ("Hi?", "hello", "hey")]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"instruction": ask, "output": text, "generator": name, **({"reference": good} if good else {})}
            for ask, text, good in rows]))
    result = compare_files(tmp_path / "kto.json", LongerWins(), file2=tmp_path / "gpt.json")
    assert (result["candidate"]["name"], result["baseline"]["name"]) == ("kto:policy", "gpt:policy")
    assert (result["exp_name"], result["candidate"]["wins"], result["baseline"]["wins"]) == ("kto", 1, 1)
    judge = LongerWins()
    assert compare_files(tmp_path / "kto.json", judge)["total"] == 2
    assert judge.in_order[0].prompt == prompt("Bye?") and set(judge.in_order[0].responses) == {"nope", "see you"}
    with pytest.raises(UserError, match=r"--baseline_key: sample 1 of .*gpt.json has no 'chosen'"):
        compare_files(tmp_path / "gpt.json", LongerWins())


def test_a_plan_judges_nothing(samples: Path, monkeypatch: Patch, capsys: Screen) -> None:
    """783 for 55% (docs/judging.md). 5 comparisons in both orders by one judge are 10 requests."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["--plan", "0.05"]) == 0
    assert re.search(r"\n +55.0% +783 +626 +391$", capsys.readouterr().out.rstrip())
    assert main(["-f", str(samples), "--plan", "--price", "30", "60"]) == 0
    shown = capsys.readouterr().out
    assert "5 comparisons of kto-simple_llama7b.json: " in shown and "10 requests, some " in shown
    assert "some $0." in shown
    assert main(["--plan", "5"]) == 2 and "--plan: got 5" in capsys.readouterr().err


def test_a_plan_is_of_what_would_be_asked(tmp_path: Path, capsys: Screen) -> None:
    """3 comparisons of 4, two of them the same: 4 questions an endpoint, none of a reward model; 120 tokens a reason.
    A question is an opening and two responses, here of 5 and of 4,005 bytes, about a thousand tokens."""
    rows = [{"prompt": prompt(x), "mine": "long " * 800 + "end.", "theirs": "short."} for x in "aabc"]
    (tmp_path / "run.json").write_text(json.dumps({"samples": rows}))
    command = ["-f", "run.json", "--plan", "0.05", "-ck", "mine", "-bk", "theirs"]
    assert main([*command, "-mc", "3", "-j", "one", "-j", "rm:two", "--reason"]) == 0
    found = re.search(r"3 comparisons of run.json(?s:.*)4 requests, some ([\d,]+) tokens in and 480 out at most",
                      capsys.readouterr().out)
    assert found and 4000 < int(found[1].replace(",", "")) < 5000
    assert main([*command, "-j", "rm:two"]) == 0 and "no requests" in capsys.readouterr().out
    assert main([*command, "-mc", "-1"]) == 2 and "--max_comp: got -1" in capsys.readouterr().err
    assert main([*command[:-2], "-bk", "thiers"]) == 2 and "did you mean 'theirs'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_does_not_take_the_result_with_it(
        samples: Path, tmp_path: Path, monkeypatch: Patch, capsys: Screen) -> None:
    def full(*anything: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write_report", full)
    assert compare_files(samples, LongerWins(), report=tmp_path / "out.html")["total"] == 5
    assert "out.html: No space left on device; the result is what it is" in capsys.readouterr().err
