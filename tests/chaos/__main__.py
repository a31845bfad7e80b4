"""`make chaos`: the long run. A hundred faults (or `--faults N`), and docs/reliability.md's table of them.

python -m tests.chaos --faults 100 --seed 7 --write
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.chaos.faults import FAULTS, LEASE, Struck, campaign, fault_rig

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by make chaos -->", "<!-- end -->"


def table(struck: list[Struck], clips: int, seed: int, took: float) -> str:
    """The faults as rows of Markdown."""
    of = defaultdict[str, list[Struck]](list)
    for each in struck:
        of[each.what].append(each)
    rows = [
        f"| {what} | {len(found)} | 0 | 0 | {sum(each.repeated for each in found)} "
        f"| {median(each.seconds for each in found):.0f} | {max(each.seconds for each in found):.0f} |"
        for what, found in of.items()
    ]
    head = (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, seed {seed}: {len(struck)} faults while {clips} clips "
        f"were rendered, in {took / 60:.0f} minutes; leases of {LEASE:.0f} s.\n\n"
        "| what | times | clips lost | published twice | attempts repeated | seconds to recover, median | worst |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Breaks a stack over and over, and checks that nothing is lost.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", help="faults whose name contains this")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the stack is ended on the way out
    chosen = [fault for fault in FAULTS if not asked.only or asked.only in fault.what]
    order = [chosen[k % len(chosen)] for k in range(asked.faults)]
    random.Random(asked.seed).shuffle(order)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rushes-chaos-") as folder, fault_rig(Path(folder), asked.seed) as rig:
        struck = campaign(rig, order)
        counted = rig.check()  # raises where a clip was lost or published twice: the zeros below are what it found
    said = table(struck, counted["clips"], asked.seed, time.monotonic() - began)
    print(said)
    if asked.write:
        text = DOCUMENT.read_text()
        before, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{said}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
