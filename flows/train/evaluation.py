"""Measuring a model of the world: `model.score` in a process of its own, and its figures in the model's row.

Both `rushes eval` and training go this way. Measured again, a model's figures are replaced; nothing else of its row is
touched. This process never loads torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from db.models import record_scores, register_model
from flows.clients.ledger import ledger
from flows.settings import Settings
from model.loading.card import SHIPPED, ModelCard

JUDGE = SHIPPED / "checker"  # what judges the clips of a model of the world, where it is shipped
JUDGES_FILES = ("checker.safetensors", "vae/config.json")
EVALUATION = "evaluation"  # the figures' name among a model's scores


class NoJudge(ValueError):
    """The folder holds no judge. Name one that `python -m model.score.judge` wrote."""

    exit_code = 2


class EvaluationFailed(RuntimeError):
    """The process that measures ended badly; what it said is on standard error. Nothing was recorded."""

    exit_code = 1


def find_judge(folder: Path = JUDGE) -> Path:
    """The folder, if a judge lies in it. Raises NoJudge."""
    missing = [name for name in JUDGES_FILES if not (folder / name).is_file()]
    if missing:
        raise NoJudge(
            f"judge {folder} has no {missing[0]}: name a folder that `python -m model.score.judge` wrote with --judge"
        )
    return folder.resolve()


def measuring(
    model: Path,
    judge: Path,
    out: Path,
    *,
    prompts: int,
    threads: int,
    modes: int = 0,
    sheet: Path | None = None,
) -> list[str]:
    """The command that measures a model and writes the figures to `out`. It ends when its standard input does."""
    command = [sys.executable, "-u", "-m", "model.score", "--attached", "--model", str(model), "--judge", str(judge)]
    command += ["--out", str(out), "--prompts", str(prompts), "--threads", str(threads), "--modes", str(modes)]
    return command + (["--sheet", str(sheet.absolute())] if sheet else [])


def figures_of(out: Path, digest: str) -> dict[str, Any] | None:
    """The figures measured of the weights of this digest; None where nothing was."""
    figures = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return figures if figures.get("digest") == digest else None


def evaluate(
    settings: Settings,
    card: ModelCard,
    judge: Path,
    *,
    prompts: int,
    modes: int,
    threads: int,
    sheet: Path | None = None,
) -> Path:
    """Measures, shows what is said meanwhile, and records the figures; returns the file that holds them too.

    Raises EvaluationFailed, NotRunning.
    """
    out = settings.home / "evaluations" / f"{card.digest[:12]}.json"
    with ledger(settings) as ledgers:
        with ledgers.begin() as session:  # an hour of measuring for a ledger that is down would be sad
            register_model(session, card.digest, card.name, str(card.path), card.to_json())
        run(measuring(card.path, judge, out, prompts=prompts, threads=threads, modes=modes, sheet=sheet))
        figures = figures_of(out, card.digest)
        if figures is None:
            raise EvaluationFailed(f"{card.path} changed while it was measured: nothing was recorded")
        with ledgers.begin() as session:
            record_scores(session, card.digest, {EVALUATION: figures})
    return out


def run(command: Sequence[str]) -> None:
    """Runs it to its end. Raises EvaluationFailed. However this process ends, the other ends too."""
    packages = Path(__file__).parents[2]  # where `python -m` finds this very code
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=packages) as child:
        code = child.wait()
    if code:
        raise EvaluationFailed(f"measuring ended with exit code {code}: nothing was recorded")
