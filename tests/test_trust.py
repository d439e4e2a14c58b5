"""compare.py agreement, by judges that count characters, always name the first, or are asked again."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_compare import LongerWins, elsewhere, prompt, write_samples

import court
from compare import compare_files, main
from docket import Question
from trust import measure, table_of
from utils import REPOSITORY, UserError
from verdicts import Reading

Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
Rows = Sequence[tuple[str, str, str]]
__all__ = ["elsewhere"]  # a fixture: where .cache is made
PAIRS = [("a", "much longer.", "short."), ("b", "yes.", "nothing."), ("c", "abc", "xyz"), ("d", "here.", ""),
         ("e", "the longer one", "tiny")]


class Firsts(LongerWins):
    """It says that the first is better, whatever that is."""

    name = "first"

    def read(self, text: str) -> Reading:
        return Reading(1.0)


class ShorterWins(LongerWins):
    name = "shorter"

    def read(self, text: str) -> Reading:
        first = super().read(text).first
        return Reading(None if first is None else 1 - first)


def write_pairs(path: Path, rows: Rows = PAIRS) -> Path:
    """Rows of (prompt, what people chose, the other), all of the test split."""
    path.write_text("".join(json.dumps({"prompt": text, "chosen": chosen, "rejected": rejected, "split": "test"}) + "\n"
                            for text, chosen, rejected in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return str(write_pairs(tmp_path / "pairs.jsonl"))


def test_numbers_of_a_judge_that_prefers_the_longer_by_hand(pairs: str) -> None:
    """It is right on a and e, wrong on b, ties on c, and is unparsed on d: (1 + 0 + 1/2 + 1) / 4, and 2 of the 3 that
    it decided. Of a, b and e it prefers the longer one 3 times, people 2 times. In both orders it says the same.

    By random.Random(0) the chosen response stands second, second, first, first, second: people say 2, 2, 1, (1), 2, the
    judge 2, 1, tie, -, 2. p_o = 2/4, p_e = 1/4 * 1/4 + 3/4 * 2/4 + 0 = 7/16, kappa = (8 - 7) / (16 - 7).
    """
    line = measure(pairs, LongerWins())
    assert (line["total"], line["prompts"], line["ties"], line["unparsed"]) == (5, 5, 1, 1)
    assert (line["accuracy"]["value"], line["accuracy"]["n"]) == (0.625, 4)
    assert (line["decided"]["value"], line["decided"]["n"]) == (2 / 3, 3)
    assert line["kappa"]["value"] == pytest.approx(1 / 9) and line["kappa"]["n"] == 4
    assert (line["length_bias"]["value"], line["length_bias"]["n"]) == (1, 3)
    assert line["people_length_bias"]["value"] == pytest.approx(2 / 3)
    assert (line["position_bias"]["value"], line["position_bias"]["n"]) == (0.5, 8)
    assert (line["flip_rate"]["value"], line["flip_rate"]["n"]) == (0, 4)
    for measured in ("accuracy", "decided", "kappa", "length_bias", "people_length_bias", "position_bias", "flip_rate"):
        low, high = line[measured]["interval"]
        assert low <= line[measured]["value"] <= high and high - low > 0.1, measured


def test_a_judge_that_always_names_the_first_is_right_half_the_time_and_agrees_by_chance(tmp_path: Path) -> None:
    """In both orders each verdict flips: all are ties, and of equal verdicts there are none, by chance or without. In
    one order it is right where the chosen response happens to be first, and p_o = p_e = that share: kappa is 0."""
    file = str(write_pairs(tmp_path / "p.jsonl", [(str(number), "good.", "bad.") for number in range(40)]))
    both, one = measure(file, Firsts()), measure(file, judge := Firsts(), orders=1)
    assert (both["accuracy"]["value"], both["kappa"]["value"], both["ties"]) == (0.5, 0, 40)
    assert (both["position_bias"]["value"], both["flip_rate"]["value"]) == (1, 1)
    assert both["decided"] == {"value": None, "interval": [0, 1], "n": 0}
    share = sum(question.responses[0] == "good." for question in judge.seen) / 40
    assert one["accuracy"]["value"] == share and 0.3 < share < 0.7
    assert one["kappa"]["value"] == pytest.approx(0, abs=1e-12)
    assert "position_bias" not in one and "flip_rate" not in one


def test_position_bias_counts_each_order(tmp_path: Path) -> None:
    """What begins with x wins in the first place: in "xx" against "long." both orders name the first, in "xx" against
    "long!" likewise, and in "c." against "longer" the longer wins twice, once from each place: 5 of 6."""
    file = str(write_pairs(tmp_path / "p.jsonl", [("a", "xx", "long."), ("b", "long!", "xx"), ("c", "c.", "longer")]))
    line = measure(file, LongerWins(likes_first="x"))
    assert line["position_bias"]["value"] == pytest.approx(5 / 6)
    assert (line["flip_rate"]["value"], line["ties"]) == (pytest.approx(2 / 3), 2)


def test_a_judge_that_scores_each_response_by_itself_has_no_position_bias_to_tell(pairs: str) -> None:
    judge = LongerWins()
    judge.order_blind = True
    line = measure(pairs, judge)
    assert len(judge.seen) == 5 and line["orders"] == 1 and "position_bias" not in line
    assert line["accuracy"]["value"] == 0.625 and "first place         n/a" in table_of(line)


def annotation(text: str, one: str, two: str, preference: Any) -> dict[str, Any]:
    return {"instruction": text, "output_1": one, "output_2": two, "preference": preference, "annotator": "a person"}


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_ties_of_people_are_counted_and_left_out_of_the_accuracy(tmp_path: Path, ending: str, capsys: Screen) -> None:
    """Right, wrong, and two ties: of those it says one by length, and ties on the other. Of three that differ in length
    people prefer the longer one once, the shorter once, and neither: (1 + 0 + 1/2) / 3.

    Agreement on 2 of 4; the chosen ones stand second, second, first, first: people say 2, 2, tie, tie, the judge 2, 1,
    1, tie. p_e = 0 * 1/2 + 1/2 * 1/4 + 1/2 * 1/4 = 1/4, kappa = (1/2 - 1/4) / (3/4).
    """
    rows = [annotation("a", "short", "longer one", 2), annotation("b", "ab", "abc", 1),
            annotation("c", "long", "x", 1.5), annotation("d", "same", "size", 0)]
    file = tmp_path / f"people.{ending}"
    file.write_text(json.dumps(rows, indent=1) if ending == "json" else "\n".join(map(json.dumps, rows)))
    line = measure(str(file), LongerWins())
    assert (line["total"], line["people_ties"], line["split"]) == (4, 2, "all")
    assert (line["accuracy"]["value"], line["accuracy"]["n"]) == (0.5, 2)
    assert line["kappa"]["value"] == pytest.approx(1 / 3)
    assert (line["length_bias"]["value"], line["people_length_bias"]["value"]) == (1, 0.5)
    assert "2 pairs are ties by people: left out of the accuracy" in table_of(line)


@pytest.mark.parametrize(("text", "message"), [
    (json.dumps(annotation("a", "b", "c", 1)) + "\n" + json.dumps(annotation("a", "b", "c", 3)),
     "people.json:2: preference is 3, allowed are 1 and 2"),
    (json.dumps(annotation("a", "b", "c", True)), "people.json:1: preference is True"),
    (json.dumps(annotation("a", "b", "c", None)), "people.json:1: preference is None"),
    (json.dumps(annotation("a", "b", "c", [1])), r"people.json:1: preference is \[1\]"),
    (json.dumps([annotation("a", "b", "c", 1), {"output_1": "b", "output_2": "c"}]),
     "people.json row 2: 'instruction' is None, where text is needed"),
    ('{"prompt": "a", "chosen": "b", "split": "test"}', "people.json:1: no 'rejected'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "split": "train"}', "no row whose split is 'test'"),
    ('{"prompt": "a", "completion": "b", "label": true, "split": "test"}', "no pairs in its test split"),
    ("{", "people.json:1: no valid JSON"), ("", "is empty")])
def test_a_bad_row_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "people.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        measure(str(file), LongerWins())


def test_a_data_set_goes_by_its_name_and_split() -> None:
    lengths = {split: len((REPOSITORY / f"examples/demo_judge/{split}.jsonl").read_text().splitlines())
               for split in ("train", "test")}
    assert measure("demo_judge", Firsts())["total"] == lengths["test"]
    assert measure("demo_judge", Firsts(), split="all")["total"] == sum(lengths.values())


def test_a_part_is_drawn_by_the_seed_and_a_larger_part_holds_it(tmp_path: Path) -> None:
    file = str(write_pairs(tmp_path / "p.jsonl", [(str(number), "good.", "bad.") for number in range(40)]))

    def asked(seed: int, most: int | None) -> list[Question]:
        line = measure(file, judge := LongerWins(), seed=seed, max_comp=most, orders=1)
        assert line["available"] == 40 and line["total"] == (most or 40)
        return judge.in_order

    few, more, every, other = asked(0, 10), asked(0, 20), asked(0, None), asked(1, 10)
    assert set(few) < set(more) < set(every) and set(few) != set(other)
    assert max(int(question.prompt.split()[1]) for question in few) > 9  # not the first ones
    assert "10 pairs, drawn from 40, of 10 prompts" in table_of(measure(file, LongerWins(), max_comp=10))


def test_pairs_of_the_same_prompt_count_as_one_prompt(tmp_path: Path) -> None:
    """Each of 60 prompts three times over, with the same outcome: three times the pairs tell nothing more."""
    rows = [(str(number), *(("longer", "x") if number % 3 else ("x", "longer"))) for number in range(60)]
    once = measure(str(write_pairs(tmp_path / "once.jsonl", rows)), LongerWins())
    thrice = measure(str(write_pairs(tmp_path / "thrice.jsonl", rows * 3)), LongerWins())
    assert (once["accuracy"]["n"], thrice["accuracy"]["n"], thrice["prompts"]) == (60, 180, 60)
    for measured in ("accuracy", "people_length_bias"):
        assert thrice[measured]["interval"] == pytest.approx(once[measured]["interval"], abs=0.015), measured


def test_of_a_panel_each_judge_is_measured_and_how_far_they_agree(pairs: str) -> None:
    """The longer ones are right on a and e, wrong on b; "shorter" is right on b alone; both tie on c. In the panel of
    three "longer" decides with "also longer" but for c. Of longer and shorter only c's verdict is the same: p_o = 1/4,
    p_e = 2/4 * 1/4 + 1/4 * 2/4 + 1/4 * 1/4 (candidate, baseline, tie) = 5/16, kappa = (4 - 5) / (16 - 5)."""
    also = LongerWins()
    also.name = "also longer"
    line = measure(pairs, [LongerWins(), also, ShorterWins()])
    assert line["judge"] == "longer + also longer + shorter"
    assert [(part["judge"], part["accuracy"]["value"]) for part in line["panel"]] == [
        ("longer", 0.625), ("also longer", 0.625), ("shorter", 0.375)]
    assert (line["accuracy"]["value"], line["unparsed"]) == (0.625, 1)
    assert "flip_rate" in line["panel"][0] and "flip_rate" not in line
    assert [(pair["judges"], pair["kappa"]) for pair in line["between_judges"]] == [
        (["longer", "also longer"], 1), (["longer", "shorter"], pytest.approx(-1 / 11)),
        (["also longer", "shorter"], pytest.approx(-1 / 11))]
    screen = table_of(line)
    assert "judge 3: shorter\n" in screen and "kappa of longer and shorter: -0.09 [" in screen
    heads = next(row for row in screen.splitlines() if "judge 1  " in row)
    [accuracy] = [row for row in screen.splitlines() if row.startswith("accuracy") and "%]" in row]
    assert [accuracy[heads.index(head):][:5] for head in ("judge 1", "judge 3", "panel")] == ["62.5%", "37.5%", "62.5%"]


def test_the_table_is_aligned_and_says_what_each_number_is(pairs: str) -> None:
    line = measure(pairs, LongerWins())

    def share(key: str) -> str:
        low, high = line[key]["interval"]
        return f"{line[key]['value']:.1%} [{low:.1%}, {high:.1%}]"

    low, high = line["kappa"]["interval"]
    cells = {
        "accuracy": share("accuracy"), "  without its ties": share("decided"), "kappa": f"0.11 [{low:.2f}, {high:.2f}]",
        "first place": share("position_bias"), "longer response": share("length_bias"),
        "  by people": share("people_length_bias"), "flip rate": share("flip_rate"), "ties": "1", "unparsed": "1"}
    said = table_of(line).splitlines()
    assert said[:3] == [f"{pairs} (split test): 5 pairs, of 5 prompts; seed 0", "judge: longer", ""]
    start = 20 + max(map(len, cells.values()))
    assert [row[:start] for row in said[3:12]] == [f"{name:<18}  {text}".ljust(start) for name, text in cells.items()]
    words = [row[start:] for row in said[3:12]]
    assert "chance is 50%" in words[0] and all(text.startswith("  ") and text[2] != " " for text in words)
    assert said[13].startswith("the judge: cannot be told from a coin by these pairs")
    assert said[-1] == "0 requests (0 retries), 0 answers known before"


@pytest.mark.parametrize(("judge", "words"), [(LongerWins(), "right more often"), (ShorterWins(), "right less often")])
def test_it_says_whether_the_judge_is_better_than_a_coin(tmp_path: Path, judge: LongerWins, words: str) -> None:
    """20 of 20 right is Wilson's [0.84, 1]."""
    file = write_pairs(tmp_path / "p.jsonl", [(str(number), "longer", "x") for number in range(20)])
    assert f"\nthe judge: {words} than a coin\n" in table_of(measure(str(file), judge))


def test_where_nothing_can_be_read_there_is_nothing_to_tell(tmp_path: Path) -> None:
    line = measure(str(write_pairs(tmp_path / "p.jsonl", [("a", "b", "")])), LongerWins())
    assert (line["accuracy"]["value"], line["kappa"]["value"], line["unparsed"]) == (None, None, 1)
    assert "accuracy            nothing to tell" in table_of(line) and json.dumps(line, allow_nan=False)


def test_what_was_asked_before_is_not_asked_again(pairs: str, tmp_path: Path, monkeypatch: Patch, capsys: Screen
                                                  ) -> None:
    """Stopped after 7 of 10 requests, the same command sends 3. The line is what a run without a stop gives."""
    judges = [LongerWins(stop_after=7), LongerWins(), LongerWins()]
    monkeypatch.setattr(court, "make_judge", lambda *options: judges[0])
    command = ["agreement", pairs, "-r", str(tmp_path / "lines.jsonl")]
    assert main(command) == 2 and not (tmp_path / "lines.jsonl").exists()
    assert "error: the endpoint is down" in capsys.readouterr().err
    assert judges.pop(0) and main(command) == 0 and len(judges[0].seen) == 3
    assert judges.pop(0) and main([*command, "--no_cache"]) == 0 and len(judges[0].seen) == 10
    resumed, whole = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert (resumed.pop("cached"), whole.pop("cached")) == (7, 0)
    assert {**resumed, "date": 0} == {**whole, "date": 0}


def test_answers_are_shared_with_comparisons_of_the_same_texts(pairs: str, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "run.json", [(prompt(text), chosen, other) for text, chosen, other in PAIRS])
    compare_files(samples, LongerWins(), cache=tmp_path / "answers.jsonl")
    line = measure(pairs, judge := LongerWins(), cache=tmp_path / "answers.jsonl")
    assert not judge.seen and line["cached"] == 10


def test_the_judgments_are_written_with_what_people_chose(pairs: str, tmp_path: Path) -> None:
    measure(pairs, LongerWins(), save_csv=tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        side = "A" if row["src_A"] == "chosen" else "B"
        assert (row["input"], row[f"response_{side}"]) in [(prompt(text), chosen) for text, chosen, _ in PAIRS]
    assert len(rows) == 10


@pytest.mark.parametrize(("options", "message"), [
    ("demoo", "no dataset 'demoo'.*did you mean 'demo'"), ("no.jsonl", "no file or folder no.jsonl"),
    ("demo -mc 0", "--max_comp: got 0"), ("demo -r no/such.jsonl", "--results_file: cannot write"),
    ("demo -csv no/such.csv", "--save_csv: cannot write"), ("demo -j rm:/no/such", "--judge rm:/no/such: no such"),
    ("demo -j hf:/no/such -j hf:/no/such", "is named twice")])
def test_a_mistake_on_the_command_line_ends_with_2(monkeypatch: Patch, capsys: Screen, options: str, message: str
                                                   ) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert main(["agreement", *options.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_help_loads_no_heavy_library() -> None:
    code = """
import sys, compare
try:
    compare.main(["agreement", "--help"])
finally:
    assert not {"torch", "transformers", "openai", "numpy", "omegaconf"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={}, capture_output=True, text=True)
    assert done.returncode == 0 and "LABELLED" in done.stdout and "--split" in done.stdout, done.stderr
