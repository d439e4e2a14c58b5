"""How far losses, gradients and metrics on several processes are off the naive path's on one: a row a loss.

    python benchmarks/ranks.py [--ranks 2 3 4 8] [--losses sft dpo kto ppo]

In float64, on a toy whose policy is sharded, a batch of 7 rows. Of the gradient: the norm of the difference, as part of
the whole. Of losses and metrics the largest difference. The larger of two ways of cutting the batch up.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def main() -> None:
    from test_distributed import FAMILIES, on_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--losses", nargs="+", default=FAMILIES)
    args = parser.parse_args()
    errors = {n: on_ranks(n, args.losses) for n in args.ranks}
    print(f"| loss | {' | '.join(f'{n} ranks: gradient | losses, metrics' for n in args.ranks)} |\n"
          f"|---|{'---:|' * (2 * len(args.ranks))}")
    for loss in args.losses:
        cells = []
        for n in args.ranks:
            found = [values for name, values in errors[n].items() if name.split()[0] == loss]
            cells += [max(gradient for gradient, *_ in found), max(max(rest) for _, *rest in found)]
        print(f"| {loss} | {' | '.join(f'{value:.1e}' for value in cells)} |")


if __name__ == "__main__":
    main()
