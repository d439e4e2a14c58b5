"""What a comparison came to: the line that is kept, the table on the screen, the page for a browser."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from court import Court, Heard
from judge import Bill, Comparison, Summary, Verdict, notice, summarise
from samples_file import SamplesFile

if TYPE_CHECKING:
    from anytime import Stopping

PART = ("win_rate", "interval", "ties", "unparsed", "flips")  # what is said of a panel's judge by itself


@dataclass(frozen=True)
class Outcome:
    """Comparisons that were judged. names: of candidate and baseline; lengths: of their responses, in `unit`."""

    samples: SamplesFile
    names: tuple[str, str]
    comparisons: Sequence[Comparison]
    lengths: Sequence[Sequence[int]]
    unit: str
    heard: Heard
    bill: Bill
    seed: int

    @classmethod
    def heard_in(cls, court: Court, samples: SamplesFile, names: tuple[str, str], comparisons: Sequence[Comparison],
                 counter: tuple[Callable[[str], int], str], save_csv: str | Path = "",
                 stopping: "Stopping | None" = None) -> "Outcome":
        """Have them judged. samples: the candidate's; counter: its `length_counter`; the others as of `Court.hear`."""
        before, (count, unit) = replace(court.bill), counter
        heard = court.hear(comparisons, names, save_csv, stopping)
        comparisons = comparisons[:len(heard.verdicts)]
        lengths = [[count(one.candidate) for one in comparisons], [count(one.baseline) for one in comparisons]]
        return cls(samples, names, comparisons, lengths, unit, heard, court.bill.since(before), court.asking.seed)

    def line(self) -> dict[str, Any]:
        """The line of `-r`."""
        heard = self.heard
        summary = summarise(self.comparisons, heard.verdicts, self.lengths, self.seed)
        return {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"), "total": summary.total,
            "seed": self.seed, "exp_name": self.samples.exp_name, "judge": heard.name,
            "candidate": {"name": self.names[0], "wins": summary.candidate_wins, "lengths": self.lengths[0]},
            "baseline": {"name": self.names[1], "wins": summary.baseline_wins, "lengths": self.lengths[1]},
            "config": self.samples.config, **facts(summary), **(heard.stopping.facts() if heard.stopping else {}),
            **self.by_dataset(), **self.panel(), "length_unit": self.unit, "orders": max(heard.orders),
            "cached": heard.cached, **self.bill.facts(),
        }

    def of(self, verdicts: Sequence[Verdict], places: Sequence[int]) -> Summary:
        """What some verdicts come to, on the comparisons at `places`."""
        return summarise([self.comparisons[place] for place in places], verdicts,
                         [[own[place] for place in places] for own in self.lengths], self.seed)

    def by_dataset(self) -> dict[str, Any]:
        """Where the prompts are of several data sets, the win rate on each."""
        places: dict[str, list[int]] = {}
        for place, comparison in enumerate(self.comparisons):
            places.setdefault(comparison.dataset or "unknown", []).append(place)
        if len(places) < 2:
            return {}
        parts = {name: self.of([self.heard.verdicts[place] for place in own], own) for name, own in places.items()}
        return {"datasets": {name: {"total": part.total, "win_rate": part.win_rate, "interval": list(part.interval)}
                             for name, part in sorted(parts.items())}}

    def panel(self) -> dict[str, Any]:
        """Of several judges: what each one's verdicts come to, and how far each two agree, beyond chance."""
        judges, by_judge = self.heard.judges, self.heard.by_judge
        if len(judges) < 2:
            return {}
        everything, prompts = range(len(self.comparisons)), [one.prompt for one in self.comparisons]
        alone = [{"judge": judge.name, **{key: value for key, value in facts(self.of(verdicts, everything)).items()
                                          if key in PART}}
                 for judge, verdicts in zip(judges, by_judge, strict=True)]
        return {"panel": alone, "kappa": [
            {"judges": [judges[i].name, judges[j].name], **agreement_of(by_judge[i], by_judge[j], prompts)}
            for i, j in combinations(range(len(judges)), 2)]}

    def write_page(self, path: str | Path, line: Mapping[str, Any]) -> None:
        """What `--report` asks for."""
        from report import Shown, write_report

        rows = [Shown.of(comparison, verdict, [(judge.name, judge.labels, own[place]) for judge, own in
                                               zip(self.heard.judges, self.heard.by_judge, strict=True)],
                         (self.lengths[0][place], self.lengths[1][place]))
                for place, (comparison, verdict) in enumerate(zip(self.comparisons, self.heard.verdicts, strict=True))]
        write_report(path, line, rows)


def facts(summary: Summary) -> dict[str, Any]:
    """The statistics of a summary. flip_rate: of the comparisons of which both orders could be read."""
    readable = summary.total - summary.unparsed
    flips = {} if summary.flips is None else {
        "flips": summary.flips, "flip_rate": summary.flips / readable if readable else 0.0}
    controlled = {} if summary.controlled is None else {"length_controlled": {
        "win_rate": summary.controlled.win_rate, "interval": [summary.controlled.low, summary.controlled.high],
        "length_effect": summary.controlled.length_effect}}
    return {"ties": summary.ties, "unparsed": summary.unparsed, "win_rate": summary.win_rate,
            "interval": list(summary.interval), "p_value": summary.p_value, **controlled, **flips}


def agreement_of(one: Sequence[Verdict], other: Sequence[Verdict], prompts: Sequence[str]) -> dict[str, Any]:
    """Cohen's kappa of two judges' verdicts (candidate, tie, baseline), of the comparisons that both could read."""
    from agreements import kappa

    both = [row for row in zip([a.score for a in one], [b.score for b in other], prompts, strict=True)
            if None not in row]
    if not both:
        return {"kappa": None, "interval": None, "n": 0}
    found = kappa([ours for ours, _, _ in both], [theirs for _, theirs, _ in both], [prompt for *_, prompt in both])
    return {"kappa": None if found.value != found.value else found.value, "interval": [found.low, found.high],
            "n": found.n}


def table_of(line: Mapping[str, Any]) -> str:
    """A result's line as a small table for the screen."""
    sides = [line["candidate"], line["baseline"]]
    rows = [(side["name"], side["wins"], f"{sum(side['lengths']) / line['total']:.1f}") for side in sides]
    rows += [("ties", line["ties"], ""), ("unparsed", line["unparsed"], "")]
    width = max(len(name) for name, *_ in rows)
    heading = f"mean length ({line['length_unit']})"
    said = [f"{line['exp_name']}: {line['total']} comparisons, judge {line['judge']}, seed {line['seed']}", "",
            f"{'':{width}}  {'wins':>6}  {'share':>6}  {heading}"]
    said += [f"{name:{width}}  {wins:>6}  {wins / line['total']:>6.1%}  {length:>{len(heading)}}".rstrip()
             for name, wins, length in rows]
    return "\n".join([*said, "", *statistics(line), *parts(line), *costs(line)])


def statistics(line: Mapping[str, Any]) -> list[str]:
    if line["win_rate"] is None:
        return ["no verdict could be read"]
    said = [f"win rate {rate(line)} (95% interval; a tie is half a win, unparsed verdicts are left out)"]
    if "stopped" in line:
        said.append(f"after {line['total']}: {line['stopped']}; interval and p = {line['p_value']:.2g} hold however "
                    "often one looks")
    else:
        said.append(f"exact test against 50%: p = {line['p_value']:.2g}")
    if "length_controlled" in line:
        said.append(f"at equal lengths {rate(line['length_controlled'])}")
    if "flips" in line:
        said.append(f"in {line['flips']} of the ties the judge changed its mind with the order "
                    f"({line['flip_rate']:.1%} of what it judged)")
    return said


def rate(part: Mapping[str, Any]) -> str:
    if part["win_rate"] is None:
        return "none that could be read"
    low, high = part["interval"]
    return f"{part['win_rate']:.1%} [{low:.1%}, {high:.1%}]"


def parts(line: Mapping[str, Any]) -> list[str]:
    """By data set, by judge, and how far judges agree."""
    said = [f"on {name} ({part['total']}): {rate(part)}" for name, part in line.get("datasets", {}).items()]
    said += [f"by {part['judge']} alone: {rate(part)}, {part['ties']} ties"
             f"{f' ({n} by the order)' if (n := part.get('flips')) else ''}, {part['unparsed']} unparsed"
             for part in line.get("panel", [])]
    for pair in line.get("kappa", []):
        value = "none" if pair["kappa"] is None else f"{pair['kappa']:.2f} [{pair['interval'][0]:.2f}, " \
                                                     f"{pair['interval'][1]:.2f}]"
        said.append(f"kappa of {' and '.join(pair['judges'])}: {value}")
    return said


def costs(line: Mapping[str, Any]) -> list[str]:
    tokens = line["tokens"]
    cost = f", ${line['cost']:.4f}" if "cost" in line else ""
    counted = f", {tokens['in']} tokens in, {tokens['out']} out{cost}" if tokens["in"] or cost else ""
    return [f"{line['requests']} requests ({line['retries']} retries), {line['cached']} answers known before{counted}"]


def tell_empty(name: str, texts: Sequence[str]) -> None:
    if empty := sum(not text.strip() for text in texts):
        notice(f"{empty} of {len(texts)} responses of {name} are empty; they are judged as they are")


def append(results_file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with results_file.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"\nappended to {results_file}")
