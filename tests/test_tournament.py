"""compare.py rank: every two of several systems, by a judge that counts characters or an endpoint of our own."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judged import serve
from test_compare import LongerWins, prompt, write_samples
from test_judge import CHATML

import court
import tournament
from compare import compare_files, main
from docket import Docket
from judge import Question
from ratings import ELO, bradley_terry
from tournament import file_and_key, rank_files, table_of
from utils import REPOSITORY, UserError

from endpoint import Endpoint, completion  # isort: skip  # of benchmarks/, which `judged` puts on the path

Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
ORDERS = ["abc"] * 10 + ["acb"] * 4 + ["bac"] * 4 + ["bca", "cab"]  # of the systems a, b and c, longest answer first


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    """Where .cache and results.jsonl are made."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """On 20 prompts a is longer than b 15 times, b than c 15 times, a than c 18 times; the data's answer is longest."""
    return [write_samples(tmp_path / f"{name}.json", [
        (prompt(str(i)), "the longest", name * (3 - order.index(name))) for i, order in enumerate(ORDERS)])
        for name in "abc"]


def judged_by(monkeypatch: Patch, *judges: LongerWins) -> None:
    """Let the commands that follow have these judges, one a command."""
    waiting = list(judges)
    monkeypatch.setattr(court, "make_judge", lambda *options: waiting.pop(0))


def command(files: Sequence[Path], *more: str) -> list[str]:
    return ["rank", *map(str, files), *more]


class Interrupted(LongerWins):
    """Somebody presses Ctrl-C after so many answers."""

    def ask(self, questions: Sequence[Question], docket: Docket) -> None:
        try:
            super().ask(questions, docket)
        except UserError:
            raise KeyboardInterrupt from None


def test_ratings_of_three_systems_by_hand(three: list[Path]) -> None:
    """Odds of 3 between neighbours and 9 between the ends: ratings near log 3, 0 and -log 3. With the prior, a tie of
    each with rating 0, they are r, 0 and -r where 15 + 18 - 20 P(r) - 20 P(2 r) + 1/2 - P(r) = 0."""
    result, lines = rank_files(three, LongerWins())
    a, b, c = result["systems"]
    assert [system["name"] for system in (a, b, c)] == ["a", "b", "c"] and len(lines) == 3
    r = a["elo"] / ELO
    P, P2 = 1 / (1 + math.exp(-r)), 1 / (1 + math.exp(-2 * r))
    assert math.isclose(21 * P + 20 * P2, 33.5, abs_tol=1e-8) and r == pytest.approx(math.log(3), rel=0.1)
    assert (b["elo"], c["elo"]) == pytest.approx((0, -a["elo"]), abs=1e-6)
    assert [system["win_rate"] for system in (a, b, c)] == pytest.approx([33 / 40, 20 / 40, 7 / 40])
    assert [row for rates in result["win_rates"] for row in rates] == pytest.approx(
        [None, 0.75, 0.9, 0.25, None, 0.75, 0.1, 0.25, None])
    assert (a["comparisons"], result["comparisons"], result["prompts"]) == (40, 60, 20)


def test_intervals_take_prompts_as_independent(three: list[Path]) -> None:
    """The same rows with a prompt's three comparisons as one cluster, and not as three."""
    result, _ = rank_files(three, LongerWins())
    rows = [(ours, theirs, float(order.index(ours) < order.index(theirs)))
            for ours, theirs in ("ab", "ac", "bc") for order in ORDERS]
    by_prompt, alone = bradley_terry(rows, [*range(20)] * 3), bradley_terry(rows)
    for system, rating, other in zip(result["systems"], by_prompt, alone, strict=True):
        assert [system["elo"], *system["elo_interval"]] == pytest.approx(rating.elo)
        assert system["elo_interval"] != pytest.approx(other.elo[1:], abs=0.1)


def test_a_line_of_two_is_what_compare_py_writes_of_them(three: list[Path]) -> None:
    a, b, _ = three
    _, [first, *_] = rank_files(three, LongerWins(), seed=3, orders=1)
    alone = compare_files(a, LongerWins(), file2=b, seed=3, orders=1)
    assert (first["candidate"]["name"], first["baseline"]["name"]) == ("a", "b")
    for line in (first, alone):
        del line["date"], line["candidate"]["name"], line["baseline"]["name"]
    assert first == alone and first["win_rate"] == 0.75


def test_lengths_are_in_tokens_of_the_candidates_run(three: list[Path], monkeypatch: Patch) -> None:
    """As if a run's tokenizer made one token, two or three of any text."""
    monkeypatch.setattr(tournament, "length_counter", lambda config: (
        lambda text: "_abc".index(config["exp_name"]), "tokens"))
    _, lines = rank_files(three, LongerWins(), max_comp=1)
    assert [(line["candidate"]["lengths"], line["baseline"]["lengths"]) for line in lines] == [
        ([1], [1]), ([1], [1]), ([2], [2])]


def test_the_screen_and_the_files(three: list[Path], monkeypatch: Patch, capsys: Screen) -> None:
    """The judge is made once for the three pairs; the same command again asks for nothing."""
    again = LongerWins()
    judged_by(monkeypatch, LongerWins(), again)
    for _ in range(2):
        assert main(command(three, "-r", "r.jsonl", "--ratings", "ratings.json")) == 0
    screen = capsys.readouterr()
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(line["candidate"]["name"], line["baseline"]["name"], line["cached"]) for line in lines] == [
        (*pair, known) for known in (0, 40) for pair in ("ab", "ac", "bc")]
    assert not again.seen and "appended to r.jsonl" in screen.out and "wrote ratings.json" in screen.out
    assert "pair 3 of 3: b against c, 20 comparisons" in screen.err
    result = json.loads(Path("ratings.json").read_text())
    assert result["judge"] == "longer" and result["pairs"][1]["wins"] == 18 and result["cached"] == 120
    assert result["systems"][0]["file"] == str(three[0]) and result["systems"][0]["key"] == "policy"
    assert table_of(result) in screen.out


def test_the_table_is_aligned(three: list[Path]) -> None:
    """Of 20 prompts 15 and 18 are more than half: Wilson's intervals are 53.1% to 88.8% and 69.9% to 97.2%."""
    result, _ = rank_files(three, LongerWins())
    result["pairs"][0]["interval"] = [0.4, 0.9]
    for system, points in zip(result["systems"], (180, 0, -180), strict=True):
        system.update(elo=points, elo_interval=[points - 99.6, points + 100])
    result.update(requests=120)
    low, high = result["systems"][0]["interval"]
    lines = table_of(result).splitlines()
    assert lines[:4] == [
        "3 systems, 60 comparisons on 20 prompts, judge longer, seed 0", "",
        "                 Elo  95% interval    win rate  95% interval    comparisons",
        f" 1  a           +180  [+80, +280]        82.5%  [{low:.1%}, {high:.1%}]           40"]
    assert lines[6:] == [
        "",
        "win rate over       1        2        3",
        " 1  a                    75.0%    90.0%*",
        " 2  b           25.0%             75.0%*",
        " 3  c           10.0%*   25.0%*", "",
        "Elo points are above the mean of all systems; * the 95% interval excludes 50%",
        "0 ties, of which 0 changed with the order, each half a win; 0 unparsed, left out",
        "120 requests (0 retries), 0 answers known before"]


def test_ties_are_halves_and_what_cannot_be_read_is_left_out(tmp_path: Path, capsys: Screen) -> None:
    """a ties with b on x and y; c is empty on x and b on z, so that of c's comparisons those on y and z with a are
    read, and with b that on y: c wins all of them."""
    files = [write_samples(tmp_path / f"{name}.json", list(zip(map(prompt, "xyz"), "...", texts, strict=True)))
             for name, texts in (("a", ("1", "1", "1")), ("b", ("1", "1", "")), ("c", ("", "22", "22")))]
    result, _ = rank_files(files, LongerWins())
    c, *_ = result["systems"]
    assert (c["name"], c["comparisons"], c["win_rate"]) == ("c", 3, 1.0)
    assert [(pair["ties"], pair["unparsed"], pair["win_rate"]) for pair in result["pairs"]] == [
        (2, 1, 0.5), (0, 1, 0.0), (0, 2, 0.0)]
    assert "2 ties, of which 0 changed with the order, each half a win; 4 unparsed, left out" in table_of(result)
    assert "1 of 3 responses of b are empty" in capsys.readouterr().err


def test_a_system_without_any_verdict_has_no_rating(tmp_path: Path) -> None:
    files = [write_samples(tmp_path / f"{name}.json", [(prompt("x"), ".", text)])
             for name, text in (("a", ""), ("b", "1"), ("c", "22"))]
    result, _ = rank_files(files, LongerWins())
    assert [system["name"] for system in result["systems"]] == ["c", "b", "a"]
    assert result["systems"][2]["elo"] is None and result["win_rates"][2] == [None, None, None]
    assert re.search(r"\n 3  a +no verdict could be read\n", table_of(result))


def test_the_names_of_systems(three: list[Path], tmp_path: Path, monkeypatch: Patch) -> None:
    """The key where it is not policy; the path where two runs have one name."""
    a, b, _ = three
    (tmp_path / "other").mkdir()
    other = write_samples(tmp_path / "other/b.json", [(prompt(str(i)), "", "d") for i in range(20)])
    result, _ = rank_files([a, f"{a}:chosen", b, other], LongerWins())
    assert {system["name"] for system in result["systems"]} == {"a", "a:chosen", f"b ({b})", f"b ({other})"}
    assert result["systems"][0]["name"] == "a:chosen"
    monkeypatch.setenv("HOME", str(tmp_path))
    colon = a.rename(tmp_path / "a:chosen.json")
    assert file_and_key(f"{colon}:chosen") == (colon, "chosen") and file_and_key(str(colon)) == (colon, "policy")
    assert file_and_key("~/b.json:chosen") == (b, "chosen") and file_and_key("runs:1/b.json") == (
        Path("runs:1/b.json"), "policy")


def test_a_run_may_be_called_by_a_number(tmp_path: Path) -> None:
    """`exp_name=7` is a number in its config."""
    file = write_samples(tmp_path / "run.json", [(prompt("a"), "x", "xx")], exp_name=7)
    result, [line] = rank_files([file, f"{file}:chosen"], LongerWins())
    assert [system["name"] for system in result["systems"]] == ["7", "7:chosen"] and line["exp_name"] == "7"


def test_the_first_prompts_are_those_that_all_systems_have(tmp_path: Path, capsys: Screen) -> None:
    """All have 3, 4 and 5; a and b share 0, 1 and 2, too, and nobody else has c's 9."""
    files = [write_samples(tmp_path / f"{name}.json", [(prompt(i), ".", f"{name}{i}") for i in numbers])
             for name, numbers in (("a", "012345"), ("b", "543210"), ("c", "95432"))]
    for most, expected in ((2, ["23"] * 3), (5, ["234501", "2345", "2345"]), (None, ["234501", "2345", "2345"])):
        judge = LongerWins()
        rank_files(files, judge, max_comp=most)
        asked = {pair: [] for pair in ("ab", "ac", "bc")}
        for question in judge.seen:
            names = "".join(sorted(response[0] for response in question.responses))
            asked[names].append(question.prompt)
        found = ["".join(i for i in "234501" if prompt(i) in asked[pair]) for pair in asked]
        assert found == [text[:most] for text in expected]
        assert all(len(prompts) == 2 * len(text) for prompts, text in zip(asked.values(), found, strict=True))
    screen = capsys.readouterr().err
    assert "4 prompts are shared by all 3 systems, and come first" in screen
    assert "without a match, left out: 1 of 5 prompts of c" in screen and "prompts of a\n" not in screen
    assert "--max_comp: 5 asked for, 4 there for some" in screen


def test_prompts_that_come_twice_match_in_order(tmp_path: Path) -> None:
    files = [write_samples(tmp_path / f"{name}.json", [(prompt(i), ".", f"{name}{n}") for n, i in enumerate(numbers)])
             for name, numbers in (("a", "xyx"), ("b", "xxy"))]
    judge = LongerWins()
    result, _ = rank_files(files, judge)
    assert [sorted(question.responses) for question in judge.in_order[::2]] == [["a0", "b0"], ["a1", "b2"],
                                                                               ["a2", "b1"]]
    assert (result["comparisons"], result["prompts"]) == (3, 2)


def test_runs_with_other_markers_and_alpacaevals_outputs_are_asked_in_the_first_ones(tmp_path: Path) -> None:
    """b alone has the prompt "y"; c, AlpacaEval's, has it, too."""
    a = write_samples(tmp_path / "a.json", [(prompt("x"), "", "A")])
    rows = [(f"<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n", "", f"b{x}<|im_end|>\n") for x in "yx"]
    b = write_samples(tmp_path / "b.json", rows, **CHATML._asdict())
    c = tmp_path / "c.json"
    c.write_text(json.dumps([{"instruction": x, "output": f"c{x}", "generator": "C", "dataset": "d"} for x in "xy"]))
    judge = LongerWins()
    rank_files([a, b, c], judge)
    asked = {(question.prompt, *sorted(question.responses)) for question in judge.seen}
    assert asked == {(prompt("x"), "A", "bx"), (prompt("x"), "A", "cx"), (prompt("x"), "bx", "cx"),
                     (prompt("y"), "by", "cy")}


@pytest.mark.parametrize(("judge", "status", "error"), [
    (LongerWins(stop_after=50), 2, "error: the endpoint is down\n"), (Interrupted(stop_after=50), 130, "")])
def test_what_is_stopped_is_kept_and_the_same_command_goes_on(
        three: list[Path], monkeypatch: Patch, capsys: Screen, judge: LongerWins, status: int, error: str) -> None:
    """Of 3 x 40 requests the first 50 are all of the first pair and, backwards, 5 comparisons of the second."""
    rest, anew = LongerWins(), LongerWins()
    judged_by(monkeypatch, judge, rest, anew)
    assert main(command(three)) == status and not Path("results.jsonl").exists()
    screen = capsys.readouterr()
    assert screen.err.endswith(error) and "stopped after 5 of 20 comparisons: a won" in screen.err
    assert "1 of 3 pairs are judged; what was answered is in the cache, and the same command goes on" in screen.err
    assert not screen.out
    assert main(command(three)) == 0 and len(rest.seen) == 70
    shown = capsys.readouterr().out.replace("0 requests (0 retries), 50 answers known before", "")
    assert main(command(three, "--no_cache")) == 0 and len(anew.seen) == 120
    assert capsys.readouterr().out.replace("0 requests (0 retries), 0 answers known before", "") == shown


def test_one_system_more_asks_for_that_one_alone(three: list[Path], monkeypatch: Patch) -> None:
    first, second = LongerWins(), LongerWins()
    judged_by(monkeypatch, first, second)
    assert main(command(three[:2])) == main(command(three)) == 0
    assert (len(first.seen), len(second.seen)) == (40, 80)
    assert {name for question in second.seen for name in question.responses} >= {"ccc", "cc", "c"}
    assert all("c" in "".join(question.responses) for question in second.seen)


def test_a_panel_decides_by_majority(three: list[Path]) -> None:
    """Two of three judges see a tie wherever an answer begins with "a", whichever is longer: a then ties, always."""
    judges = [LongerWins(likes_first="a"), LongerWins(likes_first="a"), LongerWins()]
    for number, judge in enumerate(judges):
        judge.name = f"judge {number}"
    result, lines = rank_files(three, judges)
    assert result["judge"] == "judge 0 + judge 1 + judge 2" and len(lines[0]["panel"]) == 3
    assert result["win_rates"][0][2] == pytest.approx(lines[1]["win_rate"])
    alone, _ = rank_files(three, LongerWins(likes_first="a"))
    assert "flips" in alone["pairs"][0] and "flips" not in result["pairs"][0]
    assert "0 ties" not in table_of(alone) and "changed with the order" not in table_of(result)


def test_the_bill_is_one_and_each_line_has_its_own_part(tmp_path: Path, monkeypatch: Patch, capsys: Screen) -> None:
    """2 prompts in both orders for 3 pairs are 12 requests of $0.001 each, of which five may be sent at first."""
    files = [write_samples(tmp_path / f"{name}.json", [(prompt(x), ".", f"{name}{x}") for x in "xy"])
             for name in "abc"]
    with Endpoint([(200, completion("Response 1", (1000, 2)))]) as endpoint:
        serve(endpoint, monkeypatch)
        asking = ["--concurrency", "1", "--price", "1", "0", "--ratings", "ratings.json"]
        assert main(command(files, *asking, "--max_requests", "5")) == 2
        assert "1 of 3 pairs are judged" in capsys.readouterr().err and not Path("ratings.json").exists()
        assert main(command(files, *asking, "--max_cost", "1")) == 0
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert [(line["requests"], line["cached"], line["cost"]) for line in lines] == [
        (0, 4, 0.0), (3, 1, 0.003), (4, 0, 0.004)]
    result = json.loads(Path("ratings.json").read_text())
    assert (result["requests"], result["cached"], result["cost"], len(endpoint.requests)) == (7, 5, 0.007, 12)
    assert "7 requests (0 retries), 5 answers known before, 7000 tokens in, 14 out, $0.0070" in capsys.readouterr().out
    assert {line["flips"] for line in lines} == {2} and all(system["elo"] == 0 for system in result["systems"])


@pytest.mark.parametrize(("words", "message"), [
    ("{a}", "rank: got 1 systems; give two or more"), ("{a} ./a.json", "'policy' of .*a.json is named twice"),
    ("{a} none.json", "rank: cannot read none.json"), ("{a} none.json:chosen", "rank: cannot read none.json: "),
    ("{a} {b}:polcy", "b.json:polcy: sample 1 of .* has no 'polcy' .*; did you mean 'policy'"),
    ("{a} {b} alone.json", "rank: a and alone have no prompt in common; sample all from the same"),
    ("{a} {b} -hk promt", "--history_key: .*did you mean 'prompt'"), ("{a} {b} -mc 0", "--max_comp: got 0"),
    ("{a} {b} -r none/r.jsonl", "--results_file: cannot write"), ("{a} {b} --ratings .", "--ratings: cannot write"),
    ("{a} {b} --orders 1 -j x:y", "--judge: got 'x:y'"), ("{a} {b}", "OPENAI_API_KEY is not set")])
def test_a_mistake_on_the_command_line_ends_with_2_before_anything_is_judged(
        three: list[Path], tmp_path: Path, monkeypatch: Patch, capsys: Screen, words: str, message: str) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    write_samples(tmp_path / "alone.json", [(prompt("nobody else's"), "", "")])
    assert main(["rank", *words.format(a=three[0], b=three[1]).split()]) == 2
    assert re.search(message, capsys.readouterr().err) and not Path("results.jsonl").exists()


def test_until_width_is_no_option_of_rank(three: list[Path], capsys: Screen) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command(three, "--until_width", "0.1"))
    assert "unrecognized arguments: --until_width" in capsys.readouterr().err


def test_help_needs_no_key_and_no_heavy_library() -> None:
    code = """
import sys, compare
try:
    compare.main(["rank", "--help"])
finally:
    assert not {"torch", "transformers", "openai", "numpy"} & set(sys.modules)
"""
    done: Any = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={}, capture_output=True, text=True)
    assert done.returncode == 0 and "FILE[:KEY]" in done.stdout, done.stderr
