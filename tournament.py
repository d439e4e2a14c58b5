"""Every two of several systems compared by a judge, and their ratings.

    python compare.py rank samples/kto.json samples/dpo.json samples/kto.json:chosen -mc 512 -j hf:PATH

A system is FILE or FILE:KEY: what stands under the key (policy) in a samples file, or in AlpacaEval's outputs. It is
called by the run's exp_name, with the key where that is not policy. One judge, or one panel, with one cache and one
bill hears every two of them on the prompts that both have, and Bradley-Terry ratings say what it all comes to. What was
answered is kept: the same command goes on where it was stopped, and with one system more it asks for that one alone.
A program calls `rank_files`.
"""

import argparse
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from court import DEFAULT_JUDGE, Asking, Court, add_options, require_writable_file, taken
from judge import Bill, Comparison, Judge, notice
from outcome import Outcome, append, costs, tell_empty
from samples_file import Pair, SamplesFile, comparisons_of, identities, length_counter
from utils import UserError, write_json


class System(NamedTuple):
    """What is ranked: the texts under a key of a file."""

    name: str
    file: SamplesFile
    key: str


class Field:
    """Systems with their responses, by prompt.

    prompts: each one's text in the markers of the first system, and its data set; those that all systems have come
    first, and otherwise they stand as in the first file that has them.
    """

    def __init__(self, systems: Sequence[System], history_key: str) -> None:
        self.systems, self.markers = systems, systems[0].file.markers
        known = identities([system.file for system in systems], history_key)
        found: dict[Hashable, tuple[str, str]] = {}
        self.responses: list[dict[Hashable, str]] = []
        for (_, file, key), own in zip(systems, known, strict=True):
            for identity, text, dataset in zip(own, file.texts("--history_key", history_key), file.datasets,
                                               strict=True):
                found.setdefault(identity, (file.markers.rewrite_prompt(text, self.markers), dataset))
            suffix = "" if file.markers == self.markers else file.markers.assistant_suffix
            texts = file.texts(f"{file.path}:{key}", key)
            self.responses.append(dict(zip(own, (text.removesuffix(suffix) for text in texts), strict=True)))
        self.shared = {identity for identity in found if all(identity in own for own in self.responses)}
        self.prompts = {identity: found[identity] for identity in sorted(found, key=lambda one: one not in self.shared)}

    def comparisons(self, seed: int, max_comp: int | None) -> dict[tuple[int, int], list[Comparison]]:
        """Of every two systems, by their places: on the first so many of the prompts that both have."""
        pairs = {two: self.pairs(*two) for two in combinations(range(len(self.systems)), 2)}
        fewest, most = (of(map(len, pairs.values())) for of in (min, max))
        if max_comp and max_comp > fewest:
            notice(f"--max_comp: {max_comp} asked for, {fewest} there" + " for some" * (max_comp <= most))
        return {two: comparisons_of(each, seed, max_comp) for two, each in pairs.items()}

    def pairs(self, i: int, j: int) -> list[Pair]:
        ours, theirs = self.responses[i], self.responses[j]
        pairs = [Pair(text, ours[identity], theirs[identity], dataset)
                 for identity, (text, dataset) in self.prompts.items() if identity in ours and identity in theirs]
        if not pairs:
            raise UserError(f"rank: {self.systems[i].name} and {self.systems[j].name} have no prompt in common; sample "
                            "all from the same datasets with the same seed, or leave one of the two out")
        return pairs

    def tell(self, comparisons: Mapping[tuple[int, int], Sequence[Comparison]]) -> None:
        """Say what not all systems have, where that is so, and whose responses are empty."""
        if len(self.shared) < len(self.prompts):
            notice(f"{len(self.shared)} prompts are shared by all {len(self.systems)} systems, and come first")
        for place, (system, own) in enumerate(zip(self.systems, self.responses, strict=True)):
            others = {identity for i, theirs in enumerate(self.responses) if i != place for identity in theirs}
            if alone := len(own.keys() - others):
                notice(f"without a match, left out: {alone} of {len(own)} prompts of {system.name}")
            judged = {(one.prompt, one.candidate if place == i else one.baseline)
                      for (i, j), asked in comparisons.items() if place in (i, j) for one in asked}
            tell_empty(system.name, [text for _, text in judged])


def rank_files(systems: Sequence[str | Path], judge: str | Judge | Sequence[str | Judge] = DEFAULT_JUDGE, *,
               history_key: str = "prompt", max_comp: int | None = None, **asking: Any
               ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judge every two of `systems`, each FILE or FILE:KEY; return what it comes to (`standings`), and each two's result
    line, the one named first as the candidate.

    judge, and what is in `asking`: see `court.Asking`. max_comp: of every two the first so many prompts (None: all).
    """
    how = Asking(judge, **asking)
    field = Field(read_systems(systems), history_key)
    comparisons = field.comparisons(how.seed, max_comp)
    field.tell(comparisons)
    outcomes: list[Outcome] = []
    with Court(how, field.markers) as court:
        counters = [length_counter(system.file.config) for system in field.systems[:-1]]
        try:
            for number, ((i, j), asked) in enumerate(comparisons.items(), 1):
                names = field.systems[i].name, field.systems[j].name
                notice(f"pair {number} of {len(comparisons)}: {' against '.join(names)}, {len(asked)} comparisons")
                outcomes.append(Outcome.heard_in(court, field.systems[i].file, names, asked, counters[i]))
        except (UserError, KeyboardInterrupt):
            kept = "what was answered is in the cache, and the same command goes on" if how.cache else "no cache"
            notice(f"{len(outcomes)} of {len(comparisons)} pairs are judged; {kept}")
            raise
    lines = [outcome.line() for outcome in outcomes]
    return standings(field.systems, outcomes, lines, court.bill), lines


def read_systems(named: Sequence[str | Path]) -> list[System]:
    """Systems with names that tell them apart: by the file's path where the runs' names do not."""
    if len(named) < 2:
        raise UserError(f"rank: got {len(named)} systems; give two or more, each FILE or FILE:KEY")
    places = [file_and_key(str(name)) for name in named]
    files = {path: SamplesFile.read(path, "rank") for path, _ in places}
    for (path, key), (other, its_key) in combinations(places, 2):
        if key == its_key and path.samefile(other):
            raise UserError(f"rank: {key!r} of {path} is named twice; give each system once")
    names = [files[path].exp_name + (f":{key}" if key != "policy" else "") for path, key in places]
    return [System(f"{name} ({path})" if names.count(name) > 1 else name, files[path], key)
            for name, (path, key) in zip(names, places, strict=True)]


def file_and_key(name: str) -> tuple[Path, str]:
    """What FILE or FILE:KEY means: a path that is there is a path, whatever colons it has."""
    path, (before, colon, key) = Path(name).expanduser(), name.rpartition(":")
    if not colon or "/" in key or path.exists():
        return path, "policy"
    return Path(before).expanduser(), key


class Judged(NamedTuple):
    """A verdict that could be read: the first system's score against the second on a prompt."""

    ours: str
    theirs: str
    score: float
    prompt: str


def standings(systems: Sequence[System], outcomes: Sequence[Outcome], lines: Sequence[Mapping[str, Any]], bill: Bill
              ) -> dict[str, Any]:
    """What `--ratings` keeps: the systems, best first; the win rate of each over each, in that order; and of every two
    what was judged. Prompts, not comparisons, are taken as independent; what could not be read is left out.
    """
    heard, seed = outcomes[0].heard, outcomes[0].seed
    judged = [Judged(*outcome.names, verdict.score, comparison.prompt) for outcome in outcomes
              for comparison, verdict in zip(outcome.comparisons, outcome.heard.verdicts, strict=True)
              if verdict.score is not None]
    best_first = rated(systems, judged, seed)
    pairs = [{"candidate": line["candidate"]["name"], "baseline": line["baseline"]["name"], "total": line["total"],
              "wins": line["candidate"]["wins"], "losses": line["baseline"]["wins"],
              **{key: line[key] for key in ("ties", "unparsed", "flips", "win_rate", "interval") if key in line}}
             for line in lines]
    rates = {(pair["candidate"], pair["baseline"]): pair["win_rate"] for pair in pairs}
    rates |= {(theirs, ours): None if rate is None else 1 - rate for (ours, theirs), rate in rates.items()}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "judge": heard.name, "seed": seed,
        "orders": max(heard.orders), "comparisons": sum(pair["total"] for pair in pairs),
        "prompts": len({comparison.prompt for outcome in outcomes for comparison in outcome.comparisons}),
        "systems": best_first,
        "win_rates": [[rates.get((ours["name"], theirs["name"])) for theirs in best_first] for ours in best_first],
        "pairs": pairs, "cached": sum(line["cached"] for line in lines), **bill.facts()}


def rated(systems: Sequence[System], judged: Sequence[Judged], seed: int) -> list[dict[str, Any]]:
    """The systems, best first; who has no verdict comes last, without a rating.

    elo: points above the mean of all; win_rate: over all others; comparisons: those that could be read.
    """
    from ratings import bradley_terry
    from winrates import estimate

    ratings = bradley_terry([one[:3] for one in judged], [one.prompt for one in judged])
    found = {}
    for rating in ratings:
        own = [one for one in judged if rating.name in (one.ours, one.theirs)]
        rate = estimate([one.score if rating.name == one.ours else 1 - one.score for one in own],
                        [one.prompt for one in own], seed)
        elo, *points = rating.elo
        found[rating.name] = {"elo": elo, "elo_interval": points, "win_rate": rate.value,
                              "interval": [rate.low, rate.high], "comparisons": rate.n}
    nothing = {"elo": None, "elo_interval": None, "win_rate": None, "interval": None, "comparisons": 0}
    by_name = {system.name: system for system in systems}
    return [{"name": name, "file": str(by_name[name].file.path), "key": by_name[name].key, **found.get(name, nothing)}
            for name in dict.fromkeys([*found, *by_name])]


def table_of(result: Mapping[str, Any]) -> str:
    """The standings for the screen: ratings, then who beats whom."""
    systems, pairs = result["systems"], result["pairs"]
    heading = "win rate over"
    width = max(len(heading) - 4, *(len(system["name"]) for system in systems))
    names = [f"{number:>2}  {system['name']:{width}}" for number, system in enumerate(systems, 1)]
    said = [f"{len(systems)} systems, {result['comparisons']} comparisons on {result['prompts']} prompts, judge "
            f"{result['judge']}, seed {result['seed']}", "",
            f"{'':{width + 4}}  {'Elo':>5}  {'95% interval':14}  {'win rate':>8}  {'95% interval':14}  comparisons"]
    said += [f"{name}  {rating(system)}" for name, system in zip(names, systems, strict=True)]
    columns = [f"{number:>6} " for number in range(1, len(systems) + 1)]
    said += ["", "  ".join([f"{heading:{width + 4}}", *columns]).rstrip()]
    said += ["  ".join([name, *row]).rstrip() for name, row in zip(names, cells(result), strict=True)]
    ties, unparsed = (sum(pair[key] for pair in pairs) for key in ("ties", "unparsed"))
    flips = f", of which {sum(pair['flips'] for pair in pairs)} changed with the order" if "flips" in pairs[0] else ""
    return "\n".join([*said, "", "Elo points are above the mean of all systems; * the 95% interval excludes 50%",
                      f"{ties} ties{flips}, each half a win; {unparsed} unparsed, left out", *costs(result)])


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The win rates of each over each, with a star where it is clear who is better."""
    names = [system["name"] for system in result["systems"]]
    clear = {frozenset((pair["candidate"], pair["baseline"])) for pair in result["pairs"]
             if not pair["interval"][0] <= 0.5 <= pair["interval"][1]}
    return [[f"{'' if rate is None else f'{rate:.1%}':>6}{'*' if {ours, theirs} in clear else ' '}"
             for theirs, rate in zip(names, rates, strict=True)]
            for ours, rates in zip(names, result["win_rates"], strict=True)]


def rating(system: Mapping[str, Any]) -> str:
    if not system["comparisons"]:
        return "no verdict could be read"
    (least, most), (low, high) = system["elo_interval"], system["interval"]
    return (f"{round(system['elo']):>+5}  {f'[{round(least):+}, {round(most):+}]':14}  {system['win_rate']:>8.1%}  "
            f"{f'[{low:.1%}, {high:.1%}]':14}  {system['comparisons']:>11}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="compare.py rank", description=summary, epilog=details,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("systems", nargs="+", metavar="FILE[:KEY]", help="samples, and the key of the responses (policy)")
    add("--history_key", "-hk", default="prompt", help="key of the prompt (prompt)")
    add("--max_comp", "-mc", type=int, help="of every two the first so many prompts, those that all have first (all)")
    add("--results_file", "-r", default="results.jsonl", help="a line of every two is appended to it (results.jsonl)")
    add("--ratings", default="", metavar="FILE", help="write ratings and win rates to this file, as JSON (none)")
    add_options(add)
    return parser.parse_args(argv)


def rank(argv: Sequence[str]) -> None:
    options = vars(parse(argv))
    how, results_file, ratings = taken(options), Path(options.pop("results_file")), options.pop("ratings")
    require_writable_file("--results_file", results_file)
    require_writable_file("--ratings", ratings)
    result, lines = rank_files(**options, **vars(how))
    print(table_of(result))
    append(results_file, lines)
    if ratings:
        write_json(Path(ratings), result)
        print(f"wrote {ratings}")
