"""Every benchmark, and Markdown for docs/benchmarks.md: `python -m tests.bench [WHICH …]`, or `make bench`."""

from __future__ import annotations

import argparse

import tests.bench.model_engine
from tests.bench import beside as bench_beside
from tests.bench import ledger as bench_ledger
from tests.bench import overhead as bench_overhead
from tests.bench import planner as bench_planner
from tests.bench import prefect as bench_prefect
from tests.bench import questions as bench_questions

BENCHES = {
    **tests.bench.model_engine.BENCHES,
    **bench_overhead.BENCHES,
    **bench_planner.BENCHES,
    **bench_ledger.BENCHES,
    **bench_beside.BENCHES,
    **bench_prefect.BENCHES,
    **bench_questions.BENCHES,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*BENCHES, []], help="which (default: all)")
    tests.bench.model_engine.show(BENCHES, parser.parse_args().which)


if __name__ == "__main__":
    main()
