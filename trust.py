"""How far a judge can be trusted: its verdicts beside what people said of the same pairs.

    python compare.py agreement demo_judge -j hf:PATH -j rm:PATH

LABELLED is what `datasets=[…]` of train.py takes: the name of a data set, or a file of preference rows, in which the
chosen response is what people preferred. Or a file of AlpacaEval's annotations, {instruction, output_1, output_2,
preference}, JSON or JSON Lines, with preference 1 or 2, or 1.5 or 0 where people saw a tie.

The judge is asked as compare.py asks it, in both orders, and its answers are kept in the same place. Of several judges
each is measured, the panel that decides by majority, and how far they agree with each other.
"""

import argparse
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from court import DEFAULT_JUDGE, Asking, Court, Heard, add_options, require_writable_file, taken
from feedback import Markers
from judge import Comparison, Judge, Verdict, notice
from outcome import agreement_of, append, costs
from utils import UserError, whole_characters

if TYPE_CHECKING:
    from winrates import Estimate

SPLITS = {"test": ("test",), "train": ("train",), "all": ("train", "test")}
PREFERENCES = (1, 2, 1.5, 0)  # AlpacaEval's: which output is better; the last two are a tie


class Label(NamedTuple):
    """What people said of two responses to a formatted prompt; where it was a tie, either is `chosen`."""

    prompt: str
    chosen: str
    rejected: str
    tie: bool = False


# What people said ----------------------------------------------------------------------------------------------------

def pairs_of(labelled: str, split: str, seed: int = 0) -> list[Label]:
    """All pairs of a data set's split. seed: of the choice where the name asks for a fraction."""
    from omegaconf import OmegaConf

    from dataloader import load_datasets

    config = OmegaConf.create({"datasets": [labelled], "seed": seed})
    labels = [Label(example.prompt, example.generations[better], example.generations[worse])
              for own in SPLITS[split] for example in load_datasets(config, own).values()
              for better, worse in example.pairs]
    if not labels:
        raise UserError(f"{labelled}: no pairs in its {split} split; give a data set of pairs, of which people chose "
                        "one, or another --split")
    return labels


def is_annotated(labelled: str) -> bool:
    """Whether it is a file whose first row is one of AlpacaEval's annotations; they have no splits."""
    from sources import file_rows, is_path

    if not (is_path(labelled) and Path(labelled).expanduser().is_file()):
        return False
    _, row = next(file_rows(Path(labelled).expanduser()))
    return "output_1" in row or "output_2" in row


def annotations(file: str) -> Iterator[Label]:
    from sources import file_rows

    for place, row in file_rows(Path(file).expanduser()):
        for name in ("instruction", "output_1", "output_2"):
            if not isinstance(row.get(name), str):
                raise UserError(f"{place}: {name!r} is {row.get(name)!r:.40}, where text is needed, as in AlpacaEval's "
                                "{instruction, output_1, output_2, preference}")
        preference = row.get("preference")
        if isinstance(preference, bool) or preference not in PREFERENCES:
            raise UserError(f"{place}: preference is {preference!r:.40}, allowed are 1 and 2, for the better output, "
                            "and 1.5 or 0, for a tie")
        prompt = Markers().prompt([{"role": "user", "content": row["instruction"]}])
        better, worse = ("output_2", "output_1") if preference == 2 else ("output_1", "output_2")
        yield Label(prompt, row[better], row[worse], preference not in (1, 2))


# What the judge says -------------------------------------------------------------------------------------------------

def measure(labelled: str, judge: str | Judge | Sequence[str | Judge] = DEFAULT_JUDGE, *, split: str = "test",
            max_comp: int | None = None, save_csv: str | Path = "", **asking: Any) -> dict[str, Any]:
    """Ask the judge about what people said, and return the result's line.

    judge, and what is in `asking`: see `court.Asking`. max_comp: so many pairs, drawn by the seed (None: all); fewer
    are a part of more. save_csv: a file with a row a request.
    """
    how = Asking(judge, **asking)
    if max_comp is not None and max_comp < 1:
        raise UserError(f"--max_comp: got {max_comp}; give 1 or more, or leave it out to ask about all pairs")
    require_writable_file("--save_csv", save_csv)
    court = Court(how, Markers())  # before the data, which may take long: a judge that is not there is told at once
    split = "all" if (annotated := is_annotated(labelled)) else split
    labels = list(annotations(labelled)) if annotated else pairs_of(labelled, split, how.seed)
    if max_comp and max_comp > len(labels):
        notice(f"--max_comp: {max_comp} asked for, {len(labels)} there")
    draw = random.Random(how.seed)
    rows = [(Comparison(whole_characters(prompt), whole_characters(chosen), whole_characters(rejected),
                        draw.random() < 0.5), 0.5 if tie else 1.0) for prompt, chosen, rejected, tie in labels]
    kept = set(draw.sample(range(len(rows)), len(rows))[:max_comp])
    comparisons, people = zip(*[row for place, row in enumerate(rows) if place in kept], strict=True)
    with court:
        heard = court.hear(comparisons, ("chosen", "rejected"), save_csv)
    return {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "labelled": labelled,
            "split": split, "available": len(labels), "seed": how.seed, "judge": heard.name,
            **Trial(comparisons, people, heard).facts(), "length_unit": "characters", "orders": max(heard.orders),
            "cached": heard.cached, **court.bill.facts()}


@dataclass(frozen=True)
class Trial:
    """Pairs, each with what people chose as its candidate, people's scores of that (1, or 1/2 for a tie), and what
    judges said."""

    comparisons: Sequence[Comparison]
    people: Sequence[float]
    heard: Heard

    @property
    def prompts(self) -> list[str]:
        return [one.prompt for one in self.comparisons]

    def facts(self) -> dict[str, Any]:
        """Of the one judge or the panel; of a panel's judges, each alone and each two together."""
        judges, by_judge = self.heard.judges, self.heard.by_judge
        told = {"total": len(self.people), "prompts": len(set(self.prompts)), "people_ties": self.people.count(0.5),
                **self.of(self.heard.verdicts, judges[0].labels)}
        if len(judges) < 2:
            return told
        alone = [{"judge": judge.name, **self.of(verdicts, judge.labels)}
                 for judge, verdicts in zip(judges, by_judge, strict=True)]
        return {**told, "panel": alone, "between_judges": [
            {"judges": [judges[i].name, judges[j].name], **agreement_of(by_judge[i], by_judge[j], self.prompts)}
            for i, j in combinations(range(len(judges)), 2)]}

    def of(self, verdicts: Sequence[Verdict], labels: str) -> dict[str, Any]:
        """How far verdicts can be trusted; those that could not be read are counted, and left out. labels: the judge's.

        accuracy: where people preferred one, a judge's tie as a half; decided: without the judge's ties. kappa: of who
        says that the response in the first place, as it was drawn, is better, that in the second, or neither.
        position_bias and flip_rate: where each was asked in both orders.
        """
        from agreements import agreement, kappa, length_bias, position_bias
        from winrates import Estimate, estimate

        read = [place for place, verdict in enumerate(verdicts) if verdict.score is not None]
        own, pairs = [verdicts[place] for place in read], [self.comparisons[place] for place in read]
        judge, people = [verdict.score or 0.0 for verdict in own], [self.people[place] for place in read]
        prompts = [one.prompt for one in pairs]
        ours, theirs = [len(one.candidate) for one in pairs], [len(one.baseline) for one in pairs]
        firm = [place for place, score in enumerate(judge) if score != 0.5]
        facts = {
            "accuracy": agreement(judge, people, prompts),
            "decided": agreement([judge[place] for place in firm], [people[place] for place in firm],
                                 [prompts[place] for place in firm]),
            "kappa": (kappa(of_the_first(judge, pairs), of_the_first(people, pairs), prompts) if own
                      else Estimate(math.nan, -1, 1, 0)),
            "length_bias": length_bias(judge, ours, theirs, prompts),
            "people_length_bias": length_bias(people, ours, theirs, prompts)}
        if own and None not in [verdict.flipped for verdict in own]:
            shown = [by_order(verdict, one, labels) for verdict, one in zip(own, pairs, strict=True)]
            facts["position_bias"] = position_bias([first for first, _ in shown], [second for _, second in shown],
                                                   prompts)
            facts["flip_rate"] = estimate([float(bool(verdict.flipped)) for verdict in own], prompts)
        return {"ties": judge.count(0.5), "unparsed": len(verdicts) - len(own),
                **{name: as_json(found) for name, found in facts.items()}}


def of_the_first(scores: Sequence[float], comparisons: Sequence[Comparison]) -> list[float]:
    """The candidates' scores as those of the responses that are first in the drawn order."""
    return [score if one.candidate_first else 1 - score for score, one in zip(scores, comparisons, strict=True)]


def by_order(verdict: Verdict, comparison: Comparison, labels: str) -> tuple[float, float]:
    """The candidate's score where it was shown first, and where it was shown second."""
    first, second = (0.5 if choice is None else float(choice == labels[0]) for choice in verdict.choices)
    return (first, 1 - second) if comparison.candidate_first else (second, 1 - first)


def as_json(found: "Estimate") -> dict[str, Any]:
    """value: null where there is nothing to tell it from."""
    value = None if math.isnan(found.value) else found.value
    return {"value": value, "interval": [found.low, found.high], "n": found.n}


# On the screen -------------------------------------------------------------------------------------------------------

MEASURES = {  # of a result's line -> its name on the screen, and what it means
    "accuracy": ("accuracy", "it prefers what people prefer, its ties as a half; chance is 50%"),
    "decided": ("  without its ties", "the same, of the pairs that it decided"),
    "kappa": ("kappa", "agreement beyond chance: 0 is none, 1 is all"),
    "position_bias": ("first place", "its verdicts for the response shown first; 50% is no bias"),
    "length_bias": ("longer response", "its verdicts for the one of more characters"),
    "people_length_bias": ("  by people", "people's, of the same pairs"),
    "flip_rate": ("flip rate", "it changes its mind with the order, which makes a tie"),
    "ties": ("ties", "its own, flips included"),
    "unparsed": ("unparsed", "no verdict in its answer: left out of all the above"),
}


def table_of(line: Mapping[str, Any]) -> str:
    """A result's line as a column, what each number means beside it; of a panel a column a judge and one for them
    together, the meanings below."""
    alone = line.get("panel", [])
    heads = [f"judge {number}" for number in range(1, len(alone) + 1)] or ["judge"]
    columns = {**dict(zip(heads, alone, strict=True)), "panel": line} if alone else {"": line}
    drawn = f", drawn from {line['available']:,}" if line["total"] < line["available"] else ""
    said = [f"{line['labelled']} (split {line['split']}): {line['total']:,} pairs{drawn}, of {line['prompts']:,} "
            f"prompts; seed {line['seed']}",
            *(f"{head}: {one['judge']}" for head, one in zip(heads, alone or [line], strict=True)), ""]
    rows = [(name, [cell(column.get(key), key) for column in columns.values()], words)
            for key, (name, words) in MEASURES.items()]
    wide = max(len(text) for _, cells, _ in rows for text in cells)
    said += [row_of("", list(columns), wide)] * bool(alone)
    said += [row_of(name, cells if alone else [*cells, words], wide) for name, cells, words in rows]
    said += ["", *(row_of(name, [words], wide) for name, _, words in rows)] * bool(alone)
    return "\n".join([*said, "", *conclusions(line, columns), *costs(line)])


def row_of(name: str, cells: Sequence[str], wide: int) -> str:
    return "  ".join([f"{name:<18}", *(f"{text:<{wide}}" for text in cells)]).rstrip()


def cell(found: Any, key: str) -> str:
    if not isinstance(found, Mapping):
        return "n/a" if found is None else str(found)
    if found["value"] is None:
        return "nothing to tell"
    low, high = found["interval"]
    return (f"{found['value']:.2f} [{low:.2f}, {high:.2f}]" if key == "kappa" else
            f"{found['value']:.1%} [{low:.1%}, {high:.1%}]")


def conclusions(line: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In words: is it better than a coin, what was left out, how far do judges agree."""
    said = []
    for name, column in columns.items():
        low, high = column["accuracy"]["interval"]
        said.append(f"{name or 'the judge'}: " + (
            "right more often than a coin" if low > 0.5 else "right less often than a coin" if high < 0.5 else
            "cannot be told from a coin by these pairs: the interval of its accuracy contains 50%"))
    if line["people_ties"]:
        said.append(f"{line['people_ties']} pairs are ties by people: left out of the accuracy")
    for pair in line.get("between_judges", []):
        found = {"value": pair["kappa"], "interval": pair["interval"]}
        said.append(f"kappa of {' and '.join(pair['judges'])}: {cell(found, 'kappa')}")
    return said


# The command ---------------------------------------------------------------------------------------------------------

def parse(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="compare.py agreement", description=summary, epilog=details,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("labelled", metavar="LABELLED", help="a data set's name, or a file of pairs that people compared; see below")
    add("--split", default="test", choices=sorted(SPLITS),
        help="of the data set (test); a file without splits has a tenth of its prompts as test, take all where\n"
             "the judge was trained on none of it; AlpacaEval's annotations have no split")
    add("--max_comp", "-mc", type=int, help="so many of the pairs, drawn at random by --seed (all)")
    add("--results_file", "-r", default="",
        help="a line is appended to it (none: it is no win rate, so not for results.jsonl; from the cache the\n"
             "same command tells it again at no cost)")
    add("--save_csv", "-csv", default="", help="write each judgment to this file; people chose `chosen` (none)")
    add_options(add)
    return parser.parse_args(argv)


def agreement(argv: Sequence[str]) -> None:
    """The command line."""
    options = vars(parse(argv))
    how, results_file = taken(options), options.pop("results_file")
    require_writable_file("--results_file", results_file)
    line = measure(**options, **vars(how))
    print(table_of(line))
    if results_file:
        append(Path(results_file), [line])
