"""A comparison as one HTML file to look at: win rates, lengths, and every verdict with both responses side by side.

The file opens without a network, on a phone and in the dark. Charts are SVG that is drawn here; the list of comparisons
is JSON that `pages/report.js` puts into the page, as text alone. A policy in the page (CSP) lets no script run but
ours, nor anything be loaded: samples are other people's text, and may be hostile.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from charts import OUTCOMES, Slice, length_table, outcome_bar, percent, rate_table, safe
from feedback import Markers
from utils import REPOSITORY, UserError, whole_characters, write_atomically

if TYPE_CHECKING:
    from verdicts import Comparison, Verdict

PAGES = REPOSITORY / "pages"
# The candidate's length over the baseline's, up to so much.
BINS = [("under half", 0.5), ("shorter", 1 / 1.1), ("within 10%", 1.1), ("longer", 2.0), ("over twice", math.inf)]
SHOWN_ELSEWHERE = {"date", "total", "seed", "exp_name", "judge", "candidate", "baseline", "config", "ties", "unparsed",
                   "win_rate", "interval", "length_unit", "flips", "flip_rate", "length_controlled", "datasets",
                   "panel", "kappa"}
LABELS = {"p_value": "p-value"}
SECRET_NAME = re.compile(r"(^|_)(api)?(keys?|tokens?|secrets?|passw(or)?ds?|pwd|credentials?|auth|authorization|bearer)"
                         r"($|_)")
SECRET_VALUE = re.compile(r"\b(?:(?:sk|glpat|xox[a-z])-[\w-]{16,}|(?:hf_|gh[a-z]_|github_pat_|AKIA)[^\W_]{16,}\w*)"
                          r"|(?<=://)[^/\s@]+(?=@)|(?<=[Bb]earer )[\w.~+/=-]{8,}")


@dataclass(frozen=True)
class Shown:
    """One comparison as the report shows it.

    score: the candidate's, 1, 0.5 or 0; None where no verdict could be read. verdicts: for each order that the judge
    was asked in, who stood first ("candidate" or "baseline"), who won (one of them, or None), and the judge's words.
    lengths: the candidate's and the baseline's. flipped: the verdict changed with the order.
    """

    prompt: str
    candidate: str
    baseline: str
    score: float | None
    verdicts: list[tuple[str, str | None, str]] = field(default_factory=list)
    lengths: tuple[int, int] = (0, 0)
    dataset: str | None = None
    flipped: bool = False

    @classmethod
    def of(cls, comparison: "Comparison", verdict: "Verdict", by_judge: "Sequence[tuple[str, str, Verdict]]",
           lengths: tuple[int, int]) -> "Shown":
        """verdict: what counts; by_judge: each judge's name, its labels for the two places, and its own verdict."""
        told = []
        for name, labels, own in by_judge:
            n = len(own.choices)
            words = own.text.split(" | ") if n > 1 else [own.text]
            words = words if len(words) == n else [own.text] * n
            for sides, choice, reason, said in zip(comparison.sides(n), own.choices, own.reasons, words, strict=True):
                winner = sides[labels.index(choice)] if choice else None
                told.append((sides[0], winner, f"{name}: {reason or said}" if len(by_judge) > 1 else reason or said))
        return cls(comparison.prompt, comparison.candidate, comparison.baseline, verdict.score, told, lengths,
                   comparison.dataset or None, bool(verdict.flipped))

    @property
    def outcome(self) -> str:
        return "unparsed" if self.score is None else {1.0: "win", 0.0: "loss"}.get(self.score, "tie")


def write_report(path: str | Path, result: Mapping[str, Any], rows: Sequence[Shown]) -> None:
    """Write the report of a comparison to `path`.

    result: the result's line, as compare.py writes it; keys that it may have besides are shown where they are there.
    Settings that look like keys or passwords are left out.
    """
    text = page(without_secrets(result), rows)
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def page(result: Mapping[str, Any], rows: Sequence[Shown]) -> str:
    style, script = ((PAGES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
              "base-uri 'none'; form-action 'none'")
    names = [result[side]["name"] for side in ("candidate", "baseline")]
    unit = result.get("length_unit", "")
    return Template((PAGES / "report.html").read_text(encoding="utf-8")).substitute(
        policy=policy, style=style, script=script, data=embedded(result, rows),
        **{name: safe(value) for name, value in {
            "candidate": names[0], "baseline": names[1], "title": f"{names[0]} against {names[1]}", "unit": unit,
            "exp_name": result["exp_name"], "judge": result["judge"], "date": result["date"].replace("T", " "),
            "seed": result["seed"], "total": result["total"], "win_rate": percent(result["win_rate"]),
            "finding": finding(result),
            "config": json.dumps(result.get("config"), indent=2, ensure_ascii=False, default=str),
        }.items()},
        outcomes=outcome_bar(counts(result)), figures=figures(result), rates=rate_table(parts(result, rows)),
        lengths=length_table(differences(rows), unit))


# Text that is safe to embed ------------------------------------------------------------------------------------------

def embedded(result: Mapping[str, Any], rows: Sequence[Shown]) -> str:
    """The rows as JSON that no text in them can end or leave: what HTML takes for more is an escape, and halves of
    characters, which UTF-8 cannot hold, are replaced."""
    config = result.get("config")
    markers = Markers.from_config(config if isinstance(config, Mapping) else {})
    content = {"names": {side: result[side]["name"] for side in ("candidate", "baseline")},
               "unit": result.get("length_unit", ""),
               "rows": [{"turns": turns(row.prompt, markers), "candidate": row.candidate, "baseline": row.baseline,
                         "outcome": row.outcome, "verdicts": row.verdicts, "lengths": row.lengths,
                         "dataset": row.dataset or "", "flipped": row.flipped} for row in rows]}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}",
                  whole_characters(text))


def turns(prompt: str, markers: Markers) -> list[tuple[str, str]]:
    """(speaker, text) of the prompt's turns; all of it under no name where they cannot be told apart."""
    try:
        said = [(who, text.strip()) for who, text in markers.turns(prompt)]
    except UserError:
        said = []
    return [turn for turn in said if turn[1]] or [("", prompt)]


def digest(text: str) -> str:
    """What a Content-Security-Policy calls this very text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def without_secrets(value: Any) -> Any:
    """A copy without settings named like a key or a password, and with what looks like one taken out of texts; numbers
    of tokens stay."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in value.items()
                if not SECRET_NAME.search(name := snake_case(str(key)))
                or ("token" in name and is_count(inner))}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return SECRET_VALUE.sub("…", value) if isinstance(value, str) else value


def is_count(value: Any) -> bool:
    """Whether it is a number, or numbers by name, as those of tokens in and out."""
    return isinstance(value, int | float) or (isinstance(value, Mapping) and all(map(is_count, value.values())))


def snake_case(name: str) -> str:
    return re.sub(r"\W", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()


# Numbers -------------------------------------------------------------------------------------------------------------

def counts(result: Mapping[str, Any]) -> dict[str, int]:
    return {"win": result["candidate"]["wins"], "tie": result["ties"], "loss": result["baseline"]["wins"],
            "unparsed": result["unparsed"]}


def finding(result: Mapping[str, Any]) -> str:
    """What the interval says, in a sentence."""
    if result["win_rate"] is None or result["interval"] is None:
        return "No verdict could be read."
    low, high = result["interval"]
    ours, theirs = result["candidate"]["name"], result["baseline"]["name"]
    said = (f"the judge prefers {ours}" if low > 0.5 else f"the judge prefers {theirs}" if high < 0.5 else
            "it holds 50%, so neither is shown to be better")
    return f"95% interval {percent(low)} to {percent(high)}: {said}."


def figures(result: Mapping[str, Any]) -> str:
    """The other numbers of the result, those that it has: a <dl>'s groups."""
    flip_rate = result.get("flip_rate")
    shown = {} if "panel" in result else {
        "Flips with the order": "one order asked" if flip_rate is None else number(flip_rate, percent)}
    unit = result.get("length_unit", "")
    for side in ("candidate", "baseline"):
        lengths = result[side].get("lengths")
        if lengths:
            shown[f"Mean length, {result[side]['name']}"] = f"{sum(lengths) / len(lengths):.1f} {unit}"
    for pair in result.get("kappa", []):
        if pair["kappa"] is not None:
            low, high = pair["interval"]
            shown[f"Kappa, {' and '.join(pair['judges'])}"] = f"{pair['kappa']:.2f} ({low:.2f} to {high:.2f})"
    for key, value in flat({key: value for key, value in result.items() if key not in SHOWN_ELSEWHERE}).items():
        shown[LABELS.get(key, key.replace("_", " ").capitalize())] = number(value, lambda value: f"{value:,.4g}")
    return "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in shown.items())


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is there, a mapping within as `its_key_inner_key`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat({f"{key}_{inner}": held for inner, held in value.items()})
        elif value is not None:
            found[key] = value
    return found


def number(value: Any, form: Callable[[float], str]) -> str:
    """A fraction in its form, an integer whole, anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return form(value) if isinstance(value, float) else str(value)


def slice_of(name: str, rows: Sequence[Shown]) -> list[Slice]:
    """The rows' win rate as compare.py counts it, with its interval; nothing where no verdict could be read."""
    from winrates import estimate

    read = [(row.score, row.prompt) for row in rows if row.score is not None]
    if not read:
        return []
    scores, prompts = zip(*read, strict=True)
    found = estimate(scores, prompts)
    return [Slice(name, found.value, found.low, found.high, found.n)]


def by_dataset(rows: Sequence[Shown]) -> list[Slice]:
    names = sorted({row.dataset for row in rows if row.dataset})
    return [part for name in names for part in slice_of(name, [row for row in rows if row.dataset == name])]


def by_length(rows: Sequence[Shown]) -> list[Slice]:
    """The parts by how long the candidate's response is against the baseline's."""
    parts: dict[str, list[Shown]] = {name: [] for name, _ in BINS}
    for row in rows:
        ours, theirs = row.lengths
        ratio = ours / theirs if theirs else math.inf if ours else 1.0
        parts[next(name for name, limit in BINS if ratio <= limit)].append(row)
    return [found for name, part in parts.items() for found in slice_of(name, part)]


def parts(result: Mapping[str, Any], rows: Sequence[Shown]) -> dict[str, Sequence[Slice]]:
    """Win rates under a heading each: of all, by judge, by data set and by length."""
    overall = []
    if result["win_rate"] is not None and result["interval"] is not None:
        low, high = result["interval"]
        overall.append(Slice("all", result["win_rate"], low, high, result["total"] - result["unparsed"]))
    controlled = result.get("length_controlled") or {}
    if controlled:
        low, high = controlled["interval"]
        overall.append(Slice("length-controlled", controlled["win_rate"], low, high, None))
    judges = []
    for one in result.get("panel", []):
        if one["win_rate"] is not None:
            low, high = one["interval"]
            judges.append(Slice(one["judge"], one["win_rate"], low, high, None))
    return {"": overall, "By judge": judges, "By data set": by_dataset(rows),
            "By length, candidate to baseline": by_length(rows)}


def differences(rows: Sequence[Shown]) -> dict[str, list[int]]:
    """Candidate's length minus baseline's, for each verdict that could be read."""
    return {kind: [row.lengths[0] - row.lengths[1] for row in rows if row.outcome == kind]
            for kind in OUTCOMES if kind != "unparsed"}
