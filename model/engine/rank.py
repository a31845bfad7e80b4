"""One rank of an engine: `python -m model.engine.rank SETTINGS`, started by `model.engine.ranks` only.

An error that concerns one clip is reported as that clip's. All others are reported and end the process; the engine then
ends the other ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from model.engine.faults import cause_of
from model.engine.messages import FromRank, RankFailed, RankSettings, ToRank
from model.engine.process import Inbox, end_with
from model.engine.wire import Wire, decode

if TYPE_CHECKING:
    from model.engine.runner import Runner


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told to a whole host, it is for the engine, which ends its ranks
    settings: RankSettings = decode(json.loads(sys.argv[1]), np.zeros(0, np.uint8), [RankSettings])
    end_with(settings.parent)
    wire: Wire[FromRank, ToRank] = Wire(Connection(settings.wire), ToRank)
    runner: Runner | None = None

    def fatal(problem: BaseException, clips: Sequence[str] = ()) -> None:
        import traceback

        traceback.print_exception(problem)
        reason, cause = f"{type(problem).__name__}: {problem}", cause_of(problem)
        with suppress(OSError):
            wire.send(RankFailed(reason=reason, clips=tuple(clips), cause=cause, time=time.time()))
        sys.stderr.flush()
        os._exit(1)  # no destructors: in a broken process group they abort

    try:
        inbox = Inbox(wire, fatal)
        started = time.perf_counter()
        from model.engine.runner import Runner  # torch and DeepSpeed: the inbox sees the engine's end meanwhile

        runner = Runner(settings, wire, inbox, fatal, started)
        runner.serve()
    except BaseException as problem:
        fatal(problem, runner.at_work if runner else ())
    os._exit(0)


if __name__ == "__main__":
    main()
