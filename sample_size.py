"""How many comparisons it takes: `python compare.py --plan 0.05 [-f samples.json]`."""

from collections.abc import Sequence

from api_judge import MAX_TOKENS, MAX_TOKENS_REASON
from court import Asking
from docket import BYTES_A_TOKEN
from samples_file import SamplesFile
from utils import UserError
from verdicts import Comparison

EFFECTS = (0.02, 0.03, 0.05, 0.1, 0.2)
TIES = (0.0, 0.2, 0.5)


def plan(effects: Sequence[float], how: Asking, samples: SamplesFile | None = None,
         comparisons: Sequence[Comparison] = ()) -> str:
    """What `--plan` prints: comparisons for win rates of 50% and so much more, and what those of `samples` would tell
    and cost. effects: shares from 0 to 1/2; none are EFFECTS."""
    from winrates import comparisons_needed, half_width

    wrong = [effect for effect in effects if not 0 < abs(effect) < 0.5]
    if wrong:
        raise UserError(f"--plan: got {wrong[0]:g}; give what a win rate is off 50% by, above 0 and below 0.5, as in "
                        "0.05 for 55%")
    said = ["comparisons after which a win rate is told from 50%, in 80 of 100 experiments:", "",
            f"{'win rate':>8}" + "".join(f"  {f'{ties:.0%} ties':>8}" for ties in TIES)]
    for effect in effects or EFFECTS:
        needed = [comparisons_needed(effect, tie_share=ties) if abs(effect) < (1 - ties) / 2 else None for ties in TIES]
        said.append(f"{0.5 + effect:>8.1%}" + "".join(f"  {'' if n is None else n:>8}" for n in needed))
    if samples:
        n = len(comparisons)
        widths = ", ".join(f"{half_width(n, tie_share=ties):.1%} with {ties:.0%} ties" for ties in TIES)
        said += ["", f"{n} comparisons of {samples.path.name}: 95% interval of about +- {widths}",
                 forecast(samples, comparisons, how)]
    return "\n".join(said)


def forecast(samples: SamplesFile, comparisons: Sequence[Comparison], how: Asking) -> str:
    """Requests to an endpoint, tokens by their bytes, and dollars at most, where no answer is known yet."""
    words, bill = how.words(samples.markers), how.bill()
    paid = [judge for judge in how.several if not str(judge).startswith(("rm:", "hf:"))]
    if not paid:
        return "no requests: what judges is on this machine"
    questions = {question for comparison in comparisons for question in comparison.questions(how.orders)}
    size = sum(len(message["content"].encode(errors="replace")) for question in questions
               for message in words.messages(question.prompt, question.responses))
    requests = len(paid) * len(questions)
    tokens_in = len(paid) * size / BYTES_A_TOKEN
    tokens_out = requests * (how.max_tokens or (MAX_TOKENS_REASON if how.reason else MAX_TOKENS))
    cost = f", some ${bill.dollars(tokens_in, tokens_out):.2f}" if bill.price else " (--price tells what that costs)"
    return f"{requests} requests, some {tokens_in:,.0f} tokens in and {tokens_out:,} out at most{cost}"
