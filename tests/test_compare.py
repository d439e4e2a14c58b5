"""compare.py from the command line and as a function, by an endpoint of our own or a judge that counts characters."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judged import KEY, serve
from test_judge import CHATML

import court
import samples_file
from compare import compare_files, main
from judge import Answer, Docket, Question, Reading
from outcome import table_of
from utils import REPOSITORY, UserError
from verdict_cache import VerdictCache

from endpoint import Endpoint, completion  # isort: skip  # of benchmarks/, which `judged` puts on the path

Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
KEYS = {"date", "total", "seed", "exp_name", "judge", "candidate", "baseline", "config", "ties", "unparsed", "win_rate",
        "interval", "p_value", "length_controlled", "length_unit", "orders", "flips", "flip_rate",
        "requests", "cached", "retries", "tokens"}


class LongerWins:
    """A judge by length: more characters win, as many are a tie, an empty response is unparsed. It is asked backwards.

    likes_first: it says that the first is better where its first letter is this one.
    """

    name, labels, order_blind = "longer", "12", False

    def __init__(self, stop_after: int | None = None, likes_first: str = "") -> None:
        self.seen: list[Question] = []
        self.stop_after, self.likes_first = stop_after, likes_first

    def identity(self, question: Question) -> Any:
        return question

    def ask(self, questions: Sequence[Question], docket: Docket) -> None:
        for number in reversed(range(len(questions))):
            if len(self.seen) == self.stop_after:
                raise UserError("the endpoint is down")
            self.seen.append(questions[number])
            docket.take(number, Answer(" against ".join(questions[number].responses)))

    def read(self, text: str) -> Reading:
        first, second = text.split(" against ")
        if not first or not second:
            return Reading(None)
        if self.likes_first and first[0] == self.likes_first:
            return Reading(1.0)
        return Reading(0.5 if len(first) == len(second) else float(len(first) > len(second)))

    @property
    def in_order(self) -> list[Question]:
        return self.seen[::-1]


def prompt(text: str) -> str:
    return f"\n<|user|>\n{text}\n<|assistant|>\n"


def write_samples(path: Path, rows: Sequence[tuple[str, str, str]], **config: Any) -> Path:
    """A samples file of (prompt, chosen, policy) from a run that has no tokenizer."""
    samples = [dict(zip(("prompt", "chosen", "policy"), row, strict=True)) for row in rows]
    config = {"exp_name": path.stem, "seed": 1, "model": {"name_or_path": str(path.parent / "no-model")}, **config}
    path.write_text(json.dumps({"sampled_at": "now", "config": config, "samples": samples}))
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """By length the policy wins 2, loses 1, ties 1 and is unparsed once."""
    return write_samples(tmp_path / "kto-simple_llama7b.json", [
        (prompt("a"), "one two.", "three four five."), (prompt("b"), "x.", "y z."),
        (prompt("c"), "much longer.", "no."), (prompt("d"), "ab.", "cd."), (prompt("e"), "here.", "")])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    """Where .cache is made."""
    monkeypatch.chdir(tmp_path)


def by_content(request: dict[str, Any]) -> Any:
    """Prefers "three four five.", in whatever place; says nothing of "no."; else names the first."""
    question = request["body"]["messages"][1]["content"]
    found = re.search(r"Response (.): three four five", question)
    return f"response {found[1]}." if found else "Hmm" if ": no." in question else "Response 1"


def test_the_command_of_the_contract(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                     capsys: Screen) -> None:
    """Of 5 comparisons the policy wins the first in both orders, the third is unparsed, and 3 are ties that flip: 10
    requests, of which the second run sends none. Lengths are in words, as there is no tokenizer: 3, 2, 1, 1, 0 and 2,
    1, 2, 1, 1. The win rate is (1 + 3 / 2) / 4."""
    results = tmp_path / "result.jsonl"
    with Endpoint(by_content) as endpoint:
        serve(endpoint, monkeypatch)
        command = f"-f {samples} -mc 512 -bk chosen -ck policy -r {results}"
        assert main([*command.split(), "-st", "0"]) == 0
        assert main([*command.split(), "-st", "0"]) == 0
    first, second = (json.loads(line) for line in results.read_text().splitlines())
    assert set(first) == KEYS
    assert first["candidate"] == {"name": "policy", "wins": 1, "lengths": [3, 2, 1, 1, 0]}
    assert first["baseline"] == {"name": "chosen", "wins": 0, "lengths": [2, 1, 2, 1, 1]}
    assert (first["total"], first["unparsed"], first["ties"], first["length_unit"]) == (5, 1, 3, "words")
    assert (first["orders"], first["flips"], first["flip_rate"], first["win_rate"]) == (2, 3, 0.75, 0.625)
    assert (first["judge"], first["exp_name"], first["seed"]) == ("gpt-4-0613", "kto-simple_llama7b", 0)
    assert first["config"] == json.loads(samples.read_text())["config"]
    assert (first["requests"], first["cached"], second["requests"], second["cached"]) == (10, 0, 0, 10)
    assert {**first, "date": 0, "requests": 0, "cached": 10} == {**second, "date": 0}
    assert len(endpoint.requests) == len(VerdictCache(tmp_path / ".cache/verdicts.jsonl").answers) == 10
    screen = capsys.readouterr()
    assert re.search(r"\npolicy +1 +20.0% +1.4\n", screen.out) and "lengths are in words" in screen.err
    assert "1 of 5 responses of policy are empty" in screen.err
    assert "in 3 of the ties the judge changed its mind with the order (75.0% of what it judged)" in screen.out


def test_one_order_is_the_originals_way(samples: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The endpoint always says "Response 1": who was shown first wins. Both orders then cost the other one alone."""
    with Endpoint(["Response 1"]) as endpoint:
        serve(endpoint, monkeypatch)
        command = ["-f", str(samples), "-r", str(tmp_path / "r"), "-st", "0"]
        assert main([*command, "--orders", "1"]) == 0
        shown = [request["body"]["messages"][1]["content"] for request in endpoint.requests]
        assert main(command) == 0
    one, both = (json.loads(line) for line in (tmp_path / "r").read_text().splitlines())
    policy = ["three four five.", "y z.", "no.", "cd.", ""]
    wins = sum(f"Response 1: {text}\n" in question for text in policy for question in shown)
    assert len(shown) == 5 and "flips" not in one and one["orders"] == 1
    assert (one["candidate"]["wins"], one["baseline"]["wins"], one["ties"]) == (wins, 5 - wins, 0)
    assert (both["requests"], both["cached"], both["ties"], both["flip_rate"]) == (5, 5, 5, 1.0)


def test_a_judge_that_scores_each_response_by_itself_is_asked_once(samples: Path) -> None:
    judge = LongerWins()
    judge.order_blind = True
    result = compare_files(samples, judge)
    assert len(judge.seen) == 5 and result["orders"] == 1 and "flips" not in result


def test_the_result_counts_every_comparison_once(samples: Path) -> None:
    """2 wins, 1 loss, 1 tie, 1 unparsed of 5: a win rate of (2 + 1/2) / 4."""
    result = compare_files(samples, LongerWins())
    assert (result["candidate"]["wins"], result["baseline"]["wins"], result["ties"], result["unparsed"]) == (2, 1, 1, 1)
    assert result["win_rate"] == 0.625 and 0 <= result["interval"][0] < 0.5 < result["interval"][1] <= 1
    assert (result["judge"], result["flips"]) == ("longer", 0)


def test_a_verdict_that_changes_with_the_order_is_a_tie(samples: Path) -> None:
    """What begins with "m" is preferred where it is shown first: "much longer." against "no." is no flip, since it is
    longer, too; what begins with "x" is "x." against "y z."."""
    assert compare_files(samples, LongerWins(likes_first="m"))["flips"] == 0
    result = compare_files(samples, LongerWins(likes_first="x"))
    assert (result["flips"], result["ties"], result["candidate"]["wins"], result["flip_rate"]) == (1, 2, 1, 0.25)


def test_a_report_has_every_comparison_and_what_was_said_in_each_order(samples: Path, tmp_path: Path, monkeypatch: Patch
                                                                       ) -> None:
    """The first is won in both orders; three flip, by an endpoint that names the first response."""
    with Endpoint(by_content) as endpoint:
        serve(endpoint, monkeypatch)
        command = ["-f", str(samples), "-r", str(tmp_path / "r"), "-st", "0", "--report", str(tmp_path / "out.html")]
        assert main(command) == 0
    page = (tmp_path / "out.html").read_text()
    [data] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    rows = json.loads(data)["rows"]
    assert [row["outcome"] for row in rows].count("tie") == 3 and len(rows) == 5 and KEY not in page
    [won] = [row["verdicts"] for row in rows if row["outcome"] == "win"]
    assert {(first, winner, "1" in said) for first, winner, said in won} == {
        ("candidate", "candidate", True), ("baseline", "candidate", False)}
    assert main(["-f", str(samples), "--report", str(tmp_path)]) == 2


def test_the_table_is_aligned(samples: Path) -> None:
    result = compare_files(samples, LongerWins())
    low, high = (f"{bound:.1%}" for bound in result["interval"])
    equal = result["length_controlled"]
    controlled = {"win_rate": equal["win_rate"], "low": equal["interval"][0], "high": equal["interval"][1]}
    result.update(flips=1, flip_rate=0.25, requests=12, retries=2, tokens={"in": 900, "out": 30}, cost=0.0285)
    assert table_of(result).splitlines() == [
        "kto-simple_llama7b: 5 comparisons, judge longer, seed 0", "",
        "            wins   share  mean length (words)",
        "policy         2   40.0%                  1.4",
        "chosen         1   20.0%                  1.4",
        "ties           1   20.0%",
        "unparsed       1   20.0%", "",
        f"win rate 62.5% [{low}, {high}] (95% interval; a tie is half a win, unparsed verdicts are left out)",
        "exact test against 50%: p = 1",
        "at equal lengths {win_rate:.1%} [{low:.1%}, {high:.1%}]".format(**controlled),
        "in 1 of the ties the judge changed its mind with the order (25.0% of what it judged)",
        "12 requests (2 retries), 0 answers known before, 900 tokens in, 30 out, $0.0285"]


def test_the_first_comparisons_are_the_same_however_many_there_are(tmp_path: Path) -> None:
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "b.") for i in range(40)])
    orders = {}
    for name, options in {"all": {}, "ten": {"max_comp": 10}, "again": {}, "other": {"seed": 1}}.items():
        judge = LongerWins()
        assert compare_files(file, judge, orders=1, **options)["total"] == len(judge.seen)
        assert [one.prompt for one in judge.in_order] == [prompt(str(i)) for i in range(len(judge.seen))]
        orders[name] = [one.responses[0] for one in judge.in_order]
    assert orders["all"] == orders["again"] != orders["other"] and orders["all"][:10] == orders["ten"]
    assert 8 < orders["all"].count("b.") < 32


def test_comparisons_are_counted_not_requests(tmp_path: Path) -> None:
    judge = LongerWins()
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "b.") for i in range(9)])
    assert compare_files(file, judge, max_comp=3)["total"] == 3 and len(judge.seen) == 6


def test_a_csv_of_judgments_has_a_row_a_request_and_does_not_change_the_judging(samples: Path, tmp_path: Path) -> None:
    plain, kept = LongerWins(), LongerWins()
    compare_files(samples, plain)
    compare_files(samples, kept, save_csv=tmp_path / "all.csv")
    assert plain.seen == kept.seen
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["input", "src_A", "src_B", "response_A", "response_B", "gpt4_choice"]
    for row, question in zip(rows, kept.in_order, strict=True):
        assert (row["input"], row["response_A"], row["response_B"]) == (question.prompt, *question.responses)
    assert [{row["src_A"], row["src_B"]} for row in rows] == [{"policy", "chosen"}] * 10
    assert [first["src_A"] for first in rows[::2]] == [second["src_B"] for second in rows[1::2]]
    won = [row[f"src_{'AB'[int(row['gpt4_choice']) - 1]}"] if row["gpt4_choice"] else "" for row in rows]
    assert won == ["policy"] * 4 + ["chosen"] * 2 + [""] * 4


def test_a_reason_has_a_column_of_its_own(samples: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    with Endpoint(["Response 1. It is kind."]) as endpoint:
        serve(endpoint, monkeypatch)
        assert main(["-f", str(samples), "-r", "r", "-st", "0", "--reason", "-csv", "all.csv"]) == 0
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["It is kind."] * 10


def test_a_template_of_ones_own_is_sent_and_is_another_question(samples: Path, tmp_path: Path, monkeypatch: Patch
                                                               ) -> None:
    (tmp_path / "t.txt").write_text("{history} A: {response_1} B: {response_2}")
    with Endpoint(["Response 1"]) as endpoint:
        serve(endpoint, monkeypatch)
        for more in ([], ["--template", "t.txt"], ["--template", "t.txt"]):
            assert main(["-f", str(samples), "-r", "r", "-st", "0", "-mc", "1", *more]) == 0
    assert len(endpoint.requests) == 4
    assert {request["body"]["messages"][0]["content"] for request in endpoint.requests[2:]} == {
        "<|user|>\na A: one two. B: three four five.", "<|user|>\na A: three four five. B: one two."}


def test_lengths_are_in_the_runs_tokens_special_ones_included(tmp_path: Path) -> None:
    """A tokenizer of words and stops that puts <s> first: "one two." is <s> one two . = 4, and "x" is <s> x = 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path / "run")
    rows = [(prompt("a"), "x", "one two. and")]
    for config in ({"local_run_dir": str(tmp_path / "run")},
                   {"local_run_dir": str(tmp_path / "gone"), "model": {"name_or_path": str(tmp_path / "run")}}):
        result = compare_files(write_samples(tmp_path / "a.json", rows, **config), LongerWins())
        assert (result["candidate"]["lengths"], result["baseline"]["lengths"]) == ([5], [2])
        assert result["length_unit"] == "tokens"


def test_lengths_are_in_words_where_the_hub_is_out_of_reach(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(samples_file, "hub_answers", lambda: False)
    model = {"name_or_path": "nobody/no-such-model"}
    file = write_samples(tmp_path / "a.json", [(prompt("a"), "x", "y z")], model=model)
    assert compare_files(file, LongerWins())["length_unit"] == "words"


def test_two_runs_are_compared_on_the_prompts_that_both_have(tmp_path: Path, capsys: Screen) -> None:
    ours = write_samples(tmp_path / "kto.json", [(prompt(x), "gold", f"kto {x}") for x in "abc"])
    theirs = write_samples(tmp_path / "dpo.json", [(prompt(x), "gold", f"dpo {x}!") for x in "dcbe"])
    judge = LongerWins()
    result = compare_files(ours, judge, file2=theirs)
    assert [sorted(one.responses) for one in judge.in_order[::2]] == [["dpo b!", "kto b"], ["dpo c!", "kto c"]]
    assert (result["candidate"]["name"], result["baseline"]["name"]) == ("kto:policy", "dpo:policy")
    assert "1 of 3 prompts of" in (screen := capsys.readouterr().err) and "2 of 4 of" in screen


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    ours = write_samples(tmp_path / "a.json", [(prompt("a"), "", "longer")], exp_name="kto")
    theirs = write_samples(tmp_path / "b.json", [(prompt("a"), "", "short")], exp_name="kto")
    result = compare_files(ours, LongerWins(), file2=theirs, save_csv=tmp_path / "all.csv")
    names = [f"kto:policy ({ours})", f"kto:policy ({theirs})"]
    assert [result[side]["name"] for side in ("candidate", "baseline")] == names
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [sorted([row["src_A"], row["src_B"]]) for row in csv.DictReader(file)] == [names] * 2


def test_two_runs_with_other_markers_are_matched_by_their_turns(tmp_path: Path) -> None:
    ours = write_samples(tmp_path / "ours.json", [(prompt("a"), "", "A"), (prompt("b"), "", "B")])
    rows = [(f"<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n", "", f"{x}<|im_end|>\n") for x in "ba"]
    theirs = write_samples(tmp_path / "theirs.json", rows, **CHATML._asdict())
    judge = LongerWins()
    compare_files(ours, judge, file2=theirs)
    assert [(one.prompt, *sorted(one.responses)) for one in judge.in_order[::2]] == [
        (prompt("a"), "A", "a"), (prompt("b"), "B", "b")]


def test_a_judge_that_stops_leaves_its_verdicts_and_no_result(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                                             capsys: Screen) -> None:
    """It answers backwards: 7 of 10 requests are the last 3 comparisons and half of the second. The same again sends 3,
    and the table is as that of a run that was not stopped."""
    judges = [LongerWins(stop_after=7), LongerWins(), LongerWins()]
    monkeypatch.setattr(court, "make_judge", lambda *options: judges[0])
    table, results = tmp_path / "all.csv", tmp_path / "results.jsonl"
    command = ["-f", str(samples), "-r", str(results), "-csv"]
    assert main([*command, str(table)]) == 2
    assert not results.exists() and len(table.read_text().splitlines()) > 6
    error = capsys.readouterr().err
    assert "stopped after 3 of 5 comparisons: policy won 0, chosen 1; no result is written" in error
    assert error.endswith("error: the endpoint is down\n")
    assert judges.pop(0) and main([*command, str(table)]) == 0 and len(judges[0].seen) == 3
    assert judges.pop(0) and main([*command, str(tmp_path / "other.csv"), "--no_cache"]) == 0
    assert len(judges[0].seen) == 10 and table.read_text() == (tmp_path / "other.csv").read_text()


def test_half_a_character_is_replaced_and_not_asked_again_and_again(tmp_path: Path, monkeypatch: Patch,
                                                                   capsys: Screen) -> None:
    """JSON can hold it, a request cannot: each was tried 8 times, and then the run gave up."""
    write_samples(tmp_path / "run.json", [(prompt("\ud83d"), "a \ud83d.", "b \udc00.")])
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"instruction": "\ud83d", "output_1": "\ud83d", "output_2": "x",
                                                      "preference": 1}))
    with Endpoint(["Response 1"]) as endpoint:
        serve(endpoint, monkeypatch)
        for command in (["-f", "run.json"], ["agreement", "pairs.jsonl"]):
            assert main([*command, "-r", "r", "-st", "0", "-v", "true", "-csv", "all.csv"]) == 0
    assert len(endpoint.requests) == 4 and "\N{REPLACEMENT CHARACTER}" in capsys.readouterr().out
    assert "\N{REPLACEMENT CHARACTER}" in str([request["body"] for request in endpoint.requests])


def test_verbose_shows_each_verdict(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                    capsys: Screen) -> None:
    monkeypatch.setattr(court, "make_judge", lambda *options: LongerWins())
    assert main(["-f", str(samples), "-r", str(tmp_path / "r"), "-v", "true"]) == 0
    shown = capsys.readouterr().out
    assert "=> candidate: " in shown and shown.index(prompt("a")) < shown.index(prompt("e"))
    assert main(["-f", str(samples), "-r", str(tmp_path / "r"), "-v", "false"]) == 0
    assert "=>" not in capsys.readouterr().out


def command_of(file: Path, results: Path, *more: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "compare.py"), "-f", str(file), "-r", str(results), "--concurrency", "4",
            "--cache", str(file.parent / "cache.jsonl"), *more]


def test_a_run_that_is_killed_and_started_again_asks_only_for_what_is_missing(tmp_path: Path, monkeypatch: Patch
                                                                              ) -> None:
    """Killed after 10 requests and after 10 more, with 4 in flight, whose answers nobody has read; and half of a line
    is taken from the cache, as a kill in the middle of writing it would leave it."""
    n, in_flight = 30, 4
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "b.") for i in range(n)])
    with Endpoint(["Response 1"], delay=0.02) as endpoint:
        serve(endpoint, monkeypatch)
        for kills in (1, 2):
            with subprocess.Popen(command_of(file, tmp_path / "r"), stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) as process:
                while len(endpoint.requests) < 10 * kills:
                    time.sleep(0.005)
                os.kill(process.pid, signal.SIGKILL)
            assert not (tmp_path / "r").exists()
        kept = VerdictCache(tmp_path / "cache.jsonl").answers
        assert len(endpoint.requests) - 2 * in_flight <= len(kept) <= len(endpoint.requests)
        torn = (tmp_path / "cache.jsonl").read_bytes()
        (tmp_path / "cache.jsonl").write_bytes(torn[:-20])
        before = len(endpoint.requests)
        done = subprocess.run(command_of(file, tmp_path / "r"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(endpoint.requests) - before == 2 * n - (len(kept) - 1)
    line = json.loads((tmp_path / "r").read_text())
    assert (line["total"], line["flips"], line["cached"]) == (n, n, len(kept) - 1)
    assert KEY not in done.stdout + done.stderr + (tmp_path / "cache.jsonl").read_text() + (tmp_path / "r").read_text()


def test_of_two_runs_at_once_on_one_cache_each_question_is_asked_by_one(tmp_path: Path, monkeypatch: Patch) -> None:
    n = 40
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "b.") for i in range(n)])
    with Endpoint([(200, completion("Response 1", (100, 2)))], delay=0.05) as endpoint:
        serve(endpoint, monkeypatch)
        runs = [subprocess.Popen(command_of(file, tmp_path / name), stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
        errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert len(endpoint.requests) == 2 * n
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one["requests"] + two["requests"] == 2 * n == one["requests"] + one["cached"]
    assert one["tokens"]["in"] + two["tokens"]["in"] == 200 * n and one["flips"] == two["flips"] == n


def test_money_that_is_spent_stops_the_run_and_the_same_command_goes_on(samples: Path, tmp_path: Path,
                                                                        monkeypatch: Patch, capsys: Screen) -> None:
    """A request costs 1,000 tokens in, a dollar for a million: of $0.0045 four are paid; the rest are six."""
    with Endpoint([(200, completion("Response 1", (1000, 2)))]) as endpoint:
        serve(endpoint, monkeypatch)
        command = ["-f", str(samples), "-r", str(tmp_path / "r"), "--price", "1", "0", "--concurrency", "1"]
        assert main([*command, "--max_cost", "0.0045"]) == 2
        assert "--max_cost 0.0045 would be passed: $0.0040 are spent" in capsys.readouterr().err
        assert main([*command, "--max_cost", "1"]) == 0
    line = json.loads((tmp_path / "r").read_text())
    assert (len(endpoint.requests), line["requests"], line["cached"]) == (10, 6, 4)
    assert line["tokens"] == {"in": 6000, "out": 12} and line["cost"] == 0.006


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read"), ('{"samples": [', "is not JSON"), ("[]", "has no samples"),
    ('[{"instruction": 1}]', "no samples file"), ('{"samples": ["a"]}', "no samples file"),
    ('{"samples": []}', "has no samples"), ('{"config": {"model": "x"}, "samples": []}', "is not a run's: model is"),
    ('{"config": {"human_prefix": 5}, "samples": []}', "is not a run's"),
    ('{"samples": [{"prompt": "a", "policy": "b"}]}', r"no 'chosen' \(it has prompt, policy\)"),
    ('{"samples": [{"prompt": "a", "chosen": null, "policy": "b"}]}', "'chosen' of sample 1 .* is not a text: None")])
def test_a_bad_samples_file_is_told_in_words(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "samples.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        compare_files(path, LongerWins())


@pytest.mark.parametrize(("options", "message"), [
    ("-mc 0", "--max_comp: got 0"), ("-mc -1", "--max_comp: got -1"), ("-st -1", "--sleep_time: got -1"),
    ("-ck polcy", "did you mean 'policy'"), ("-bk policy", "a text against itself tells nothing"),
    ("-f2 {file} -bk policy", "a text against itself"), ("-f2 {folder}/none.json", "cannot read"),
    ("-r {folder}/none/r.jsonl", "--results_file: cannot write .*there is no folder"),
    ("-csv {folder}", "--save_csv: cannot write .* it is a folder"), ("-l 1", "two different characters"),
    ("-j rm:/no/such", "--judge rm:/no/such: no such folder"), ("-j hf:/no/such", "--judge hf:/no/such"),
    ("-j x:y", "--judge: got 'x:y'"), ("--max_cost 1", "--max_cost: needs --price"), ("--max_requests -1", "--max_req"),
    ("--until_width 2", "--until_width: got 2"), ("-j a -j b --until_width 0.1", "--until_width: got 2 judges"),
    ("-j a -j a", "--judge: a is named twice"), ("--max_tokens 0", "--max_tokens: got 0"),
    ("--template no.txt", "--template: cannot read no.txt"), ("-j rm:{folder} --reason", "--reason: --judge rm:"),
    ("", "OPENAI_API_KEY is not set")])
def test_a_mistake_on_the_command_line_ends_with_2_before_anything_is_judged(
        samples: Path, tmp_path: Path, monkeypatch: Patch, capsys: Screen, options: str, message: str) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["-f", str(samples), *options.format(folder=tmp_path, file=samples).split()]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "results.jsonl").exists()


def test_help_needs_no_key_and_no_heavy_library() -> None:
    code = """
import sys, compare
try:
    compare.main(["--help"])
finally:
    assert not {"torch", "transformers", "openai", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={}, capture_output=True, text=True)
    assert done.returncode == 0 and "--judge" in done.stdout, done.stderr
