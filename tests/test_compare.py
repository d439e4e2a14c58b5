"""compare.py from the command line and as a function, by an endpoint of our own or a judge that counts characters."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_judge import CHATML, Endpoint

import compare
from compare import compare_files, main
from judge import Comparison, Verdict
from utils import REPOSITORY, UserError

Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
KEYS = {"date", "total", "seed", "exp_name", "judge", "candidate", "baseline", "config",
        "ties", "unparsed", "win_rate", "interval", "length_unit"}


class LongerWins:
    """A judge by length: more characters win, as many are a tie, an empty candidate is unparsed."""

    name = "longer"

    def __init__(self, stop_after: int | None = None):
        self.seen: list[Comparison] = []
        self.stop_after = stop_after

    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[Verdict]:
        for number, comparison in enumerate(comparisons):
            if number == self.stop_after:
                raise UserError("the endpoint is down")
            self.seen.append(comparison)
            ours, other = len(comparison.candidate), len(comparison.baseline)
            if ours and ours != other:
                yield comparison.win("candidate" if ours > other else "baseline", "12", "by length")
            else:
                yield Verdict(None, why="tie" if ours else "unparsed")


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


def test_the_command_of_the_contract(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                     capsys: Screen) -> None:
    """The endpoint always says "Response 1", but nothing on its third turn: who was shown first wins, and 1 of 5 is
    unparsed. Lengths are in words, as there is no tokenizer: 3, 2, 1, 1, 0 and 2, 1, 2, 1, 1."""
    results = tmp_path / "result.jsonl"
    with Endpoint(["Response 1", "response 1.", "Hmm", "Response 1"]) as endpoint:
        endpoint.serve(monkeypatch)
        command = f"-f {samples} -mc 512 -bk chosen -ck policy -r {results}"
        assert main([*command.split(), "-st", "0"]) == 0
        assert main([*command.split(), "-st", "0"]) == 0
    first, second = (json.loads(line) for line in results.read_text().splitlines())
    assert set(first) == KEYS
    shown = [request["body"]["messages"][1]["content"] for request in endpoint.requests[:5]]
    policy = ["three four five.", "y z.", "no.", "cd.", ""]
    ours_first = [f"Response 1: {text}\n" in question for text, question in zip(policy, shown, strict=True)]
    wins = sum(ours for number, ours in enumerate(ours_first) if number != 2)
    assert first["candidate"] == {"name": "policy", "wins": wins, "lengths": [3, 2, 1, 1, 0]}
    assert first["baseline"] == {"name": "chosen", "wins": 4 - wins, "lengths": [2, 1, 2, 1, 1]}
    assert (first["total"], first["unparsed"], first["ties"], first["length_unit"]) == (5, 1, 0, "words")
    assert (first["judge"], first["exp_name"], first["seed"]) == ("gpt-4-0613", "kto-simple_llama7b", 0)
    assert first["config"] == json.loads(samples.read_text())["config"] and first["win_rate"] == wins / 5
    assert second["total"] == 5
    screen = capsys.readouterr()
    assert re.search(rf"\npolicy +{wins} +{wins * 20}.0% +1.4\n", screen.out) and "lengths are in words" in screen.err
    assert "1 of 5 responses of policy are empty" in screen.err


def test_the_result_counts_every_comparison_once(samples: Path) -> None:
    """2 wins, 1 loss, 1 tie, 1 unparsed of 5: a win rate of (2 + 1/2) / 5."""
    result = compare_files(samples, LongerWins())
    assert (result["candidate"]["wins"], result["baseline"]["wins"], result["ties"], result["unparsed"]) == (2, 1, 1, 1)
    assert result["win_rate"] == 0.5 and 0 <= result["interval"][0] < 0.5 < result["interval"][1] <= 1
    assert result["judge"] == "longer" and "flips" not in result


def test_the_table_is_aligned(samples: Path) -> None:
    result = compare_files(samples, LongerWins())
    low, high = (f"{bound:.1%}" for bound in result["interval"])
    assert compare.table_of({**result, "flips": 1}).splitlines() == [
        "kto-simple_llama7b: 5 comparisons, judge longer, seed 0", "",
        "            wins   share  mean length (words)",
        "policy         2   40.0%                  1.4",
        "chosen         1   20.0%                  1.4",
        "ties           1   20.0%",
        "unparsed       1   20.0%", "",
        f"win rate 50.0%, 95% interval {low} to {high} "
        "(of all comparisons; a tie is half a win, an unparsed verdict nobody's)",
        "in 1 of the ties the judge changed its mind with the order"]


def test_the_first_comparisons_are_the_same_however_many_there_are(tmp_path: Path) -> None:
    file = write_samples(tmp_path / "run.json", [(prompt(str(i)), "a.", "b.") for i in range(40)])
    orders = {}
    for name, options in {"all": {}, "ten": {"max_comp": 10}, "again": {}, "other": {"seed": 1}}.items():
        judge = LongerWins()
        assert compare_files(file, judge, **options)["total"] == len(judge.seen)
        assert [one.prompt for one in judge.seen] == [prompt(str(i)) for i in range(len(judge.seen))]
        orders[name] = [one.candidate_first for one in judge.seen]
    assert orders["all"] == orders["again"] != orders["other"] and orders["all"][:10] == orders["ten"]
    assert 8 < sum(orders["all"]) < 32


def test_a_csv_of_judgments_does_not_change_the_judging(samples: Path, tmp_path: Path) -> None:
    plain, kept = LongerWins(), LongerWins()
    compare_files(samples, plain)
    compare_files(samples, kept, save_csv=tmp_path / "all.csv")
    assert plain.seen == kept.seen
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["input", "src_A", "src_B", "response_A", "response_B", "gpt4_choice"]
    for row, comparison in zip(rows, kept.seen, strict=True):
        assert (row["input"], row["response_A"], row["response_B"]) == (comparison.prompt, *comparison.responses)
        assert [row["src_A"], row["src_B"]] == ["policy", "chosen"][::1 if comparison.candidate_first else -1]
    won = [row[f"src_{'AB'[int(row['gpt4_choice']) - 1]}"] if row["gpt4_choice"] else "" for row in rows]
    assert won == ["policy", "policy", "chosen", "", ""]


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
    monkeypatch.setattr(compare, "hub_answers", lambda: False)
    model = {"name_or_path": "nobody/no-such-model"}
    file = write_samples(tmp_path / "a.json", [(prompt("a"), "x", "y z")], model=model)
    assert compare_files(file, LongerWins())["length_unit"] == "words"


def test_two_runs_are_compared_on_the_prompts_that_both_have(tmp_path: Path, capsys: Screen) -> None:
    ours = write_samples(tmp_path / "kto.json", [(prompt(x), "gold", f"kto {x}") for x in "abc"])
    theirs = write_samples(tmp_path / "dpo.json", [(prompt(x), "gold", f"dpo {x}!") for x in "dcbe"])
    judge = LongerWins()
    result = compare_files(ours, judge, file2=theirs)
    assert [(one.candidate, one.baseline) for one in judge.seen] == [("kto b", "dpo b!"), ("kto c", "dpo c!")]
    assert (result["candidate"]["name"], result["baseline"]["name"]) == ("kto:policy", "dpo:policy")
    assert "1 of 3 prompts of" in (screen := capsys.readouterr().err) and "2 of 4 of" in screen


def test_two_runs_with_other_markers_are_matched_by_their_turns(tmp_path: Path) -> None:
    ours = write_samples(tmp_path / "ours.json", [(prompt("a"), "", "A"), (prompt("b"), "", "B")])
    rows = [(f"<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n", "", f"{x}<|im_end|>\n") for x in "ba"]
    theirs = write_samples(tmp_path / "theirs.json", rows, **CHATML._asdict())
    judge = LongerWins()
    compare_files(ours, judge, file2=theirs)
    assert [(one.prompt, one.candidate, one.baseline) for one in judge.seen] == [
        (prompt("a"), "A", "a"), (prompt("b"), "B", "b")]


def test_a_judge_that_stops_leaves_its_verdicts_and_no_result(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                                             capsys: Screen) -> None:
    monkeypatch.setattr(compare, "make_judge", lambda *options: LongerWins(stop_after=3))
    table, results = tmp_path / "all.csv", tmp_path / "results.jsonl"
    assert main(["-f", str(samples), "-r", str(results), "-csv", str(table)]) == 2
    assert not results.exists() and len(table.read_text().splitlines()) > 3
    error = capsys.readouterr().err
    assert "stopped after 3 of 5 comparisons: policy won 2, chosen 1; no result is written" in error
    assert error.endswith("error: the endpoint is down\n")


def test_verbose_shows_each_verdict(samples: Path, tmp_path: Path, monkeypatch: Patch,
                                    capsys: Screen) -> None:
    monkeypatch.setattr(compare, "make_judge", lambda *options: LongerWins())
    assert main(["-f", str(samples), "-r", str(tmp_path / "r"), "-v", "true"]) == 0
    assert "=> candidate: by length" in capsys.readouterr().out
    assert main(["-f", str(samples), "-r", str(tmp_path / "r"), "-v", "false"]) == 0
    assert "=>" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read"), ('{"samples": [', "is not JSON"), ("[]", "no samples file"),
    ('{"samples": ["a"]}', "no samples file"), ('{"samples": []}', "has no samples"),
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
    ("-j x:y", "--judge: got 'x:y'"), ("", "OPENAI_API_KEY is not set")])
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
