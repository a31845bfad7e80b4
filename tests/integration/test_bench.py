"""The benches run and compare like with like; what they measure is not tested, machines differ."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import torch
from sqlalchemy import Engine

from model.config import DiTConfig, Partition
from model.network.compiled import COMPILERS
from tests.bench import ledger as bench_ledger
from tests.bench import model_engine as bench
from tests.bench import model_gpu as bench_gpu
from tests.bench import prefect as bench_prefect
from tests.bench import questions as bench_questions
from tests.documents import QUESTIONS


def cells(lines: Iterable[str]) -> list[list[str]]:
    """The rows of a Markdown table without its head."""
    head, rule, *rows = lines
    assert head.count("|") == rule.count("|") and set(rule) == {"|", "-"}
    assert all(row.count("|") == head.count("|") for row in rows)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.chaos
@pytest.mark.xdist_group("ranks")
def test_a_rank_of_two_loads_half_of_what_is_divided() -> None:
    config = DiTConfig(layers=2, heads=8, head_dim=64, ffn_dim=8192, text_dim=64, freq_dim=64)
    rows = cells(bench.loading(config))
    sizes = [float(row[1].removesuffix(" GiB")) for row in rows]
    assert "whole" in rows[0][0]
    assert [row[0] for row in rows[1:]] == [
        f"by each rank of {Partition(tp=2)}",
        f"by each rank of {Partition(zero=2)}",
    ]
    assert sizes[1:] == pytest.approx([sizes[0] / 2] * 2, abs=0.02)


def test_a_step_computes_what_diffusers_computes() -> None:
    rows = cells(bench.step(rounds=1))
    assert [row[0] for row in rows] == ["1", "4", "16"]
    for row in rows:
        assert float(row[4]) < 1e-4
        assert float(row[3]) == pytest.approx(float(row[1]) / float(row[2]), rel=0.05)


@pytest.mark.chaos
@pytest.mark.xdist_group("ranks")
def test_whole_clips_are_timed_side_by_side() -> None:
    rows = cells(bench.clips(2, cores=2, at_once=[(1, 2)], steps=2))
    assert [(row[0], row[1], row[3]) for row in rows] == [("1 x 2", "1", "2"), ("2 x 1", "1", "2")]
    assert all(re.fullmatch(r"\d+%", row[6]) and float(row[2]) > 0 and float(row[4]) > 0 for row in rows)


@pytest.mark.skipif(bench_gpu.torch.cuda.is_available(), reason="this is the path without a GPU")
@pytest.mark.filterwarnings("default")  # torch's compiler warns of other parts of torch
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.chaos)])
def test_the_gpu_bench_runs_small_on_a_cpu_and_says_so(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if compiled and not any(map(shutil.which, COMPILERS)):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    said, *tables = list(bench_gpu.gpu(compiled))
    assert "no GPU here" in said
    middle, last = (k for k, line in enumerate(tables) if k and not line)
    steps, stages, trace = (cells(each) for each in (tables[1:middle], tables[middle + 1 : last], tables[last + 1 :]))
    ours = ["ours", "ours, compiled", "ours, reduce-overhead"]
    theirs = ["diffusers", "diffusers, compiled"]
    assert [row[1] for row in steps] == ([*ours, *theirs] if compiled else [ours[0], theirs[0]])
    assert all(float(row[5]) < 1e-4 and float(row[2]) > 0 for row in steps)
    quickest = min(float(row[2]) for row in steps if row[1] in ours)
    assert [row[1] for row in stages] == ["text", "denoise, 4 steps", "decode"]
    assert all(float(row[2]) > 0 for row in stages)
    assert float(stages[1][2]) == pytest.approx(4 * quickest, abs=3e-4)
    assert {row[0] for row in trace} == {group for group, _ in bench_gpu.GROUPS}
    groups = {row[0]: float(row[3]) for row in trace if row[1] == "all"}
    assert groups["matmul"] > 0 and groups["attention"] > 0
    assert all(float(row[3]) <= groups[row[0]] for row in trace)


@pytest.mark.parametrize("inference", [False, True], ids=["torch's products", "oneDNN's"])
def test_what_torch_counts_of_a_block_is_what_the_formula_says(inference: bool) -> None:
    """One block more costs what the formula says, to the operation: the rest of the network is the same."""
    setting, found = bench_gpu.CPU, list[int]()
    for layers in (1, 2):
        deep = replace(setting, config=replace(setting.config, layers=layers))
        dit, given = bench_gpu.network_of(deep), bench_gpu.inputs_of(setting.shapes[0], setting)
        with torch.inference_mode(inference):
            found.append(bench_gpu.counted(lambda dit=dit, given=given: dit(*given)))
    tokens = 3 * 4 * 4  # latent frames, rows and columns of patches of 64x64x9
    one = replace(setting.config, layers=1)
    assert found[1] - found[0] == 2 * one.operations(tokens, setting.text_tokens)


@pytest.mark.chaos
def test_the_ledger_is_measured_as_it_is() -> None:
    """A small run: every row of the table is there, with a figure of its own unit."""
    rows = cells(bench_ledger.ledger_bench(clips=600, past=500, workers=8, seconds=2))
    assert len(rows) == 7 + len(QUESTIONS)
    for row, unit in zip(
        rows, ("s", "MB", "shards/s", "ms", "shards/s", "ms", *["ms"] * (1 + len(QUESTIONS))), strict=True
    ):
        assert re.fullmatch(rf"[0-9]+ {unit}", row[1]), row
    assert int(rows[2][1].split()[0]) > 0 and int(rows[4][1].split()[0]) > 0


def test_prefects_database_is_measured_by_what_lies_in_it(empty_database_url: str) -> None:
    """All bytes are accounted for; task runs are counted as they began."""
    url = empty_database_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as database, database.cursor() as cursor:
        cursor.execute("create table task_run (flow_run_id text, start_time timestamptz)")
        cursor.execute("create table events (event text, payload text, related text, resource text)")
        cursor.execute("create index ix_events on events (event)")
        before = bench_prefect.Kept.of_database(url)
        beat, table = (
            (bench_prefect.HEARTBEAT, "{}", "[]", "{}"),
            ("prefect.artifact.updated", secrets.token_hex(25_000), "[]", "{}"),
        )
        cursor.executemany("insert into events values (%s, %s, %s, %s)", [*[beat] * 100, table, table])
        began = [f"2026-01-01 00:00:{second:02}Z" for second in (0, 3, 9, 12, 12, 30)]
        cursor.executemany("insert into task_run values (%s, %s)", [("ab"[k % 2], at) for k, at in enumerate(began)])
    after = bench_prefect.Kept.of_database(url)
    said, beat_bytes, _ = bench_prefect._events(url)
    assert after.rows == {"task_run": 6, "events": 102}
    assert sum(after.of.values()) == after.bytes
    assert after.of["the rest"] == before.of["the rest"]
    assert after.of["events"] - before.of["events"] >= 100_000
    assert said["table"] == (2, 100_008) and said["flow-run"] == (100, 600)
    assert 6 < beat_bytes < 1000
    runs = bench_prefect._task_runs(url)
    assert [len(run) for run in runs] == [3, 3]
    assert (bench_prefect._most(runs, 10.0), bench_prefect._most(runs, 1.0)) == (4, 2)


def test_the_bench_of_questions_makes_what_they_ask_about(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_questions, "ROUNDS", 2)
    bench_questions.make(database, 4000)
    rows = {question: bench_questions.timed(database, sql)[0] for question, sql in QUESTIONS.items()}
    nothing = {
        "Was anything rendered twice? (no rows: nothing was)",
        "How do two models do on the same prompts and seeds?",
    }
    assert {question for question, found in rows.items() if not found} <= nothing


@pytest.mark.chaos
def test_every_question_is_answered_among_a_million_clips_within_a_fifth_of_a_second(database: Engine) -> None:
    """By its median, which a busy machine moves less than a 95th percentile. A minute and a half, and 3 GB of disk."""
    bench_questions.make(database, 1_000_000)
    medians = {question: bench_questions.timed(database, sql)[1] for question, sql in QUESTIONS.items()}
    assert {question: median for question, median in medians.items() if median > 200} == {}
