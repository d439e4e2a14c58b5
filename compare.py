"""Win rates from samples: a judge compares two responses to each prompt.

    python compare.py -f samples/kto-simple_llama7b.json -mc 512 -bk chosen -ck policy -r result.jsonl

compares what a run sampled with the data's own answers, by a model behind an OpenAI-compatible endpoint
(OPENAI_API_KEY, OPENAI_BASE_URL), or by `-j hf:PATH` (a local instruct model) or `-j rm:PATH` (a reward model).
Each comparison is asked in both orders; where the judge changes its mind with the order it is a tie. What was answered
is kept, so that the same command goes on where it was stopped, and nothing is paid for twice (docs/judges.md).
With `-f2 OTHER.json` it compares two runs on the prompts that both have. A program calls `compare_files`
instead, and gets the result's line.

Two more commands, each with its own --help:

    python compare.py rank A.json B.json C.json           every two of several systems, and their ratings
    python compare.py agreement LABELLED.jsonl            how often a judge says what people said
"""

import argparse
import importlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from court import DEFAULT_JUDGE, Asking, Court, add_options, require_writable_file, taken
from judge import Comparison, Judge, notice
from outcome import Outcome, append, table_of, tell_empty
from samples_file import SamplesFile, comparisons_of, length_counter, pair_up
from utils import UserError, let_threads_sleep

COMMANDS = {"rank": "tournament", "agreement": "trust"}  # the first word -> its module


def compare_files(file: str | Path, judge: str | Judge | Sequence[str | Judge] = DEFAULT_JUDGE, *,
                  file2: str | Path | None = None, candidate_key: str = "policy", baseline_key: str | None = None,
                  history_key: str = "prompt", max_comp: int | None = None, save_csv: str | Path = "",
                  report: str | Path = "", until_width: float | None = None, **asking: Any) -> dict[str, Any]:
    """Judge the samples of `file`, and return the result's line.

    judge, and what is in `asking`: see `court.Asking`. file2: where the baseline's responses are (None: `file`).
    baseline_key: None is `chosen`, or `policy` with file2. max_comp: the first so many in the file's order (None: all).
    save_csv: a file with a row a request. report: a page to look at all of it in a browser. until_width: stop where
    50% is excluded, or at an interval of this width (None: judge all). Lengths are those of the uncut responses, in
    tokens of the run that made `file`.
    """
    how = Asking(judge, **asking)
    require_writable_file("--save_csv", save_csv)
    require_writable_file("--report", report)
    ours, names, comparisons = chosen_from(file, how.seed, file2, candidate_key, baseline_key, history_key, max_comp)
    stopping = None
    if until_width is not None:
        comparisons, stopping = in_random_order(comparisons, until_width, how)
    for name, texts in zip(names, ([c.candidate for c in comparisons], [c.baseline for c in comparisons]), strict=True):
        tell_empty(name, texts)
    with Court(how, ours.markers) as court:
        outcome = Outcome.heard_in(court, ours, names, comparisons, length_counter(ours.config), save_csv, stopping)
    line = outcome.line()
    if report:
        try:
            outcome.write_page(report, line)
        except OSError as error:
            notice(f"--report: cannot write {report}: {error.strerror}; the result is what it is, without a page")
    return line


def chosen_from(file: str | Path, seed: int, file2: str | Path | None = None, candidate_key: str = "policy",
                baseline_key: str | None = None, history_key: str = "prompt", max_comp: int | None = None
                ) -> tuple[SamplesFile, tuple[str, str], list[Comparison]]:
    """The candidate's file, the names of candidate and baseline, and what is to be compared (see `compare_files`)."""
    ours = SamplesFile.read(file)
    theirs = SamplesFile.read(file2) if file2 else ours
    baseline_key = baseline_key or ("policy" if file2 else "chosen")
    if candidate_key == baseline_key and theirs.path.samefile(ours.path):
        raise UserError(f"candidate and baseline are both {candidate_key!r} of {ours.path}, and a text against itself "
                        "tells nothing; give another --candidate_key, --baseline_key or --file2")
    names = (candidate_key, baseline_key)
    if theirs is not ours:
        names = (f"{ours.exp_name}:{candidate_key}", f"{theirs.exp_name}:{baseline_key}")
    if names[0] == names[1]:
        names = (f"{names[0]} ({ours.path})", f"{names[1]} ({theirs.path})")
    pairs = pair_up(ours, theirs, candidate_key, baseline_key, history_key)
    if max_comp and max_comp > len(pairs):
        notice(f"--max_comp: {max_comp} asked for, {len(pairs)} there")
    return ours, names, comparisons_of(pairs, seed, max_comp)


def in_random_order(comparisons: list[Comparison], width: float, how: Asking) -> tuple[list[Comparison], Any]:
    """The comparisons, those of a prompt together, and what says when enough of them are judged."""
    from anytime import Stopping

    if len(how.several) > 1:
        raise UserError(f"--until_width: got {len(how.several)} judges; it stops by the verdicts of one, so name one")
    by_prompt: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_prompt.setdefault(comparison.prompt, []).append(comparison)
    prompts = list(by_prompt)
    random.Random(f"{how.seed}/until_width").shuffle(prompts)
    shuffled = [comparison for prompt in prompts for comparison in by_prompt[prompt]]
    return shuffled, Stopping([comparison.prompt for comparison in shuffled], width)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--file", "-f", help="samples to compare: the candidate's, and the baseline's without -f2")
    add("--file2", "-f2", help="samples of another run, for the baseline; matched by prompt")
    add("--candidate_key", "-ck", default="policy", help="key of the candidate's response (policy)")
    add("--baseline_key", "-bk", help="key of the baseline's response (chosen; policy with -f2)")
    add("--history_key", "-hk", default="prompt", help="key of the prompt (prompt)")
    add("--max_comp", "-mc", type=int, help="compare the first so many prompts (all)")
    add("--results_file", "-r", default="results.jsonl", help="a line is appended to it (results.jsonl)")
    add("--save_csv", "-csv", default="", help="write each judgment to this file (none)")
    add("--report", default="", metavar="FILE", help="write a page to look at in a browser, all in one file (none)")
    add("--until_width", "--until-width", type=float, metavar="W",
        help="stop as soon as the interval excludes 50%% or is so narrow, 0.05 for example (judge all)")
    add("--plan", type=float, nargs="*", metavar="EFFECT",
        help="judge nothing: say how many comparisons tell 50%% from win rates that are off by so much,\n"
             "and what those of -f would cost")
    add_options(add)
    return parser.parse_args(argv)


def compare(argv: Sequence[str]) -> None:
    options = vars(parse(argv))
    how, effects, results_file = taken(options), options.pop("plan"), Path(options.pop("results_file"))
    if effects is not None:
        from sample_size import plan

        for name in ("save_csv", "report", "until_width"):
            del options[name]
        samples, _, comparisons = chosen_from(seed=how.seed, **options) if options["file"] else (None, None, ())
        return print(plan(effects, how, samples, comparisons))
    if not options["file"]:
        raise UserError("--file: got none; give samples to compare, as eval.py ++mode=sample writes them")
    require_writable_file("--results_file", results_file)
    result = compare_files(**options, **vars(how))
    print(table_of(result))
    append(results_file, [result])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: a comparison, or one of COMMANDS, whose module has a function of its name."""
    let_threads_sleep()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in COMMANDS:
            getattr(importlib.import_module(COMMANDS[argv[0]]), argv[0])(argv[1:])
        else:
            compare(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
