"""Measures what DESIGN.md section 10 sets goals for, each beside its yardstick in the same run.

    python tests/bench/run.py --output build/bench.json [--samples 5] [--only NAME]

Prints a table, with the load average of the machine after each suite; writes a list of {name, value, unit, goal, met, samples, spread}. A value is the
median of its samples; the spread is their lowest and highest. Samples of ours and of the yardstick
alternate, so that a machine whose speed drifts is fair to both.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "packaging" / "demo")]

from bench import crowd, images, iscsi, launches, lazy, listing, overview, pauses, pool, scrub
from bench.result import Result

SUITES: dict[str, Callable[[Path, int], Iterable[Result]]] = {
    "crowd": crowd.measure,
    "iscsi": iscsi.measure,
    "images": images.measure,
    "launches": launches.measure,
    "lazy": lazy.measure,
    "listing": listing.measure,
    "overview": overview.measure,
    "pauses": pauses.measure,
    "pool": pool.measure,
    "saves": pool.measure_saves,
    "scrub": scrub.measure,
}


def main() -> None:
    """Run the suites and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--only", choices=sorted(SUITES), action="append")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for FUSE and tgtd")
    results: list[Result] = []
    for name in options.only or SUITES:
        with tempfile.TemporaryDirectory(prefix="stratocache-bench-") as directory:
            for result in SUITES[name](Path(directory), options.samples):
                print(result.line(), flush=True)
                results.append(result)
        print("load average after {}: {:.1f} {:.1f} {:.1f}".format(name, *os.getloadavg()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps([result.record() for result in results], indent=1) + "\n")
    partial.rename(options.output)


if __name__ == "__main__":
    main()
