"""What the programs of `make soak` that run until a time share: their command line and their report."""

import argparse
from collections.abc import Callable


def main(description: str, run: Callable[[float, int], tuple[dict[str, float], list[str]]]) -> int:
    """Run for `--seconds` from `--seed`, print counts and faults; returns 1 if there was one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, faults = run(args.seconds, args.seed)
    print(", ".join(f"{value:,} {name}" for name, value in counts.items()), f"and {len(faults)} faults")
    for fault in faults[:20]:
        print("FAULT", fault)
    return 1 if faults else 0
