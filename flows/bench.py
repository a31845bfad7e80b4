"""Every benchmark, and Markdown for docs/benchmarks.md: `python -m flows.bench [WHICH …]`, or `make bench`."""

from __future__ import annotations

import argparse

import model.bench
from flows import bench_ledger, bench_overhead, bench_planner, bench_prefect

BENCHES = {
    **model.bench.BENCHES,
    **bench_overhead.BENCHES,
    **bench_planner.BENCHES,
    **bench_ledger.BENCHES,
    **bench_prefect.BENCHES,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.bench", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*BENCHES, []], help="which (default: all)")
    model.bench.show(BENCHES, parser.parse_args().which)


if __name__ == "__main__":
    main()
