"""The views that people ask beside `history`, in the schema `ask`: each is a list of its columns with what they mean.

They read tables and never each other, so that one may be made anew alone. Add a view to `VIEWS`: the next upgrade makes
it, describes it and lets the reader in.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from db.engines import ALIVE
from db.leases import STAGES
from db.view import HISTORY, View, ViewColumn, gpus_of, settle_views

SCHEMA = "ask"
_SCHEMA_MEANS = "read-only views for people: requests, attempts, stages, engines, usage, lineage; beside public.history"
RATE_MINUTES = 10  # that a request's present rate is of


def _view(name: str, means: str, source: str, /, **columns: tuple[str, str]) -> View:
    """`columns`: the expression, and what it means."""
    listed = {column: ViewColumn(said, sql) for column, (sql, said) in columns.items()}
    return View(name=f"{SCHEMA}.{name}", means=means, columns=listed, source=source)


_WALL = "extract(epoch from coalesce(attempt.finished_at, statement_timestamp()) - attempt.started_at)::float8"
_ENGINE_SECONDS = " + ".join(f"coalesce(attempt.{stage}_seconds, 0)" for stage in STAGES)
_SPENT = f"case when attempt.status = 'done' then {_ENGINE_SECONDS} else {_WALL} end"
_LEFT = "coalesce(counted.queued, 0) + coalesce(counted.running, 0)"
_RATE = f"""case when request.status <> 'open'
        then counted.done * 60 / nullif(extract(epoch from request.finished_at - counted.started_at), 0)
        else (select count(*) from clips clip where clip.request_id = request.id and clip.status = 'done'
                and clip.finished_at > statement_timestamp() - interval '{RATE_MINUTES} minutes')
            / greatest(least(extract(epoch from statement_timestamp() - counted.started_at) / 60, {RATE_MINUTES}), 1e-3)
        end::float8"""

REQUESTS = _view(
    "requests",
    "one row per request: its counts, how fast it goes and when it will be done",
    """from requests request
left join lateral (
    select sum(clips) filter (where status = 'queued') as queued,
           sum(clips) filter (where status = 'running') as running,
           sum(clips) filter (where status = 'done') as done,
           sum(clips) filter (where status = 'failed') as failed,
           sum(clips) filter (where status = 'quarantined') as quarantined,
           sum(clips) filter (where status = 'cancelled') as cancelled,
           sum(clips) filter (where status = 'rejected') as rejected,
           sum(reused) as reused, sum(seconds) as seconds, sum(bytes) as bytes,
           min(started_at) as started_at
    from tallies
    where tallies.request_id = request.id
) counted on true""",
    request_id=("request.id", "req_ and twelve digits of its key"),
    name=("request.name", "as its submitter called it"),
    tenant=("request.tenant", "on whose account it is"),
    model=("request.model", "the model's name"),
    model_digest=("request.model_digest", "sha256 over the model's files"),
    status=("request.status::text", "open paused completed completed_with_gaps failed cancelled"),
    priority=("request.priority::integer", "0 to 9, higher goes first"),
    deadline=("request.deadline", "when it should be done"),
    total=("request.total", "its clips; null until all are in"),
    **{
        status: (f"coalesce(counted.{status}, 0)::bigint", means)
        for status, means in {
            "queued": "clips that wait",
            "running": "clips that are rendered now",
            "done": "clips that have a file, reused ones included",
            "reused": "clips of those done that a cached render answered",
            "failed": "clips that failed for good",
            "quarantined": "clips that were put aside after too many attempts",
            "cancelled": "clips that were cancelled",
            "rejected": "lines that were skipped as bad",
        }.items()
    },
    clips_left=(f"({_LEFT})::bigint", "clips that are queued or running"),
    clips_per_minute=(
        _RATE,
        f"clips done a minute: in the last {RATE_MINUTES} minutes while it is open, else over all of its time",
    ),
    eta=(
        f"""case when request.status = 'open' and {_LEFT} > 0
        then statement_timestamp() + ({_LEFT}) / nullif({_RATE}, 0) * interval '1 minute' end""",
        "when the clips left are done at clips_per_minute; null where none came lately",
    ),
    seconds=("coalesce(counted.seconds, 0)", "engine time of the clips that were rendered for it"),
    gpu_seconds=(
        f"""coalesce((select sum(({_SPENT}) * {gpus_of("attempt")}) from clips clip
        join attempts attempt on attempt.clip_id = clip.id where clip.request_id = request.id), 0)::float8""",
        "of all attempts at its clips, failed ones included",
    ),
    bytes=(
        "coalesce(counted.bytes, 0)::bigint",
        "of the files in the store that its clips were rendered to; what it reused counts where it was rendered",
    ),
    created_at=("request.created_at", "when it was submitted"),
    started_at=("counted.started_at", "when its first clip began"),
    finished_at=("request.finished_at", "when it ended"),
    settings=("request.settings", "what was asked for all lines, as JSON"),
    source=("request.source", "where its lines came from"),
    source_sha256=("request.source_sha256", "of the file of lines"),
    flow_run_id=("request.flow_run_id", "its flow run in Prefect"),
    trace_id=("request.trace_id", "its trace"),
    tags=("request.tags", "that all of its clips have; null where there are none"),
    metadata=("request.metadata", "a JSON object of its submitter's, that all of its clips have"),
)

ATTEMPTS = _view(
    "attempts",
    "one row per attempt at a clip, failed and lost ones included",
    """from attempts attempt
join clips clip on clip.id = attempt.clip_id
join requests request on request.id = clip.request_id""",
    clip_id=("attempt.clip_id", "the clip"),
    number=("attempt.number", "1 is its first attempt"),
    request_id=("clip.request_id", "the clip's request"),
    tenant=("request.tenant", "on whose account it was"),
    model=("request.model", "the model's name"),
    status=("attempt.status::text", "running done failed lost released cancelled"),
    error_class=("attempt.error_class", "what kind of failure it was: rank_died, out_of_memory, engine_lost …"),
    error=("attempt.error", "the failure in words"),
    engine=("attempt.engine", "who made it; engine_id of ask.engines"),
    host=("attempt.host", "where"),
    partition=("attempt.partition", "how the model was split: cfg1xsp1xtp2"),
    gpus=(gpus_of("attempt"), "ranks of that partition"),
    code_version=("attempt.code_version", "of the engine"),
    shard_id=("attempt.shard_id", "the shard it was part of"),
    resumed_step=("attempt.resumed_step", "that it went on from, where an earlier one had come so far"),
    started_at=("attempt.started_at", "when it began"),
    finished_at=("attempt.finished_at", "when it ended"),
    wall_seconds=(_WALL, "from its beginning to its end, or till now; clips of one batch overlap"),
    seconds=(_SPENT, "engine time: the sum of its stages when it is done, else wall_seconds"),
    gpu_seconds=(f"({_SPENT}) * {gpus_of('attempt')}", "what it cost: seconds times gpus"),
    skipped_steps=("attempt.skipped_steps", "steps that the step cache answered"),
    peak_bytes=("attempt.peak_bytes", "memory on the fullest rank"),
    trace_id=("attempt.trace_id", "of the rendering"),
    tags=("clip.tags", "the clip's; null where it has none"),
    metadata=("clip.metadata", "the clip's: a JSON object"),
)

STAGES_VIEW = _view(
    "stages",
    "one row per stage of an attempt that was measured",
    f"""from attempts attempt
join clips clip on clip.id = attempt.clip_id
join requests request on request.id = clip.request_id
cross join lateral (values
    {", ".join(f"({k}, '{stage}', attempt.{stage}_seconds)" for k, stage in enumerate(STAGES, 1))}
) stage (position, name, seconds)
where stage.seconds is not null""",
    clip_id=("attempt.clip_id", "the clip"),
    number=("attempt.number", "of the attempt"),
    request_id=("clip.request_id", "the clip's request"),
    model=("request.model", "the model's name"),
    engine=("attempt.engine", "who did it"),
    position=("stage.position", "1 is the first stage"),
    stage=(
        "stage.name",
        "text: the prompt; denoise; decode: to frames; encode: to MP4 or PNG; put: into the store",
    ),
    seconds=("stage.seconds", "engine time"),
    started_at=("attempt.started_at", "when the attempt began"),
    finished_at=("attempt.finished_at", "when the attempt ended"),
    tags=("clip.tags", "the clip's; null where it has none"),
    metadata=("clip.metadata", "the clip's: a JSON object"),
)

ENGINES = _view(
    "engines",
    "one row per engine that ever registered: what it is, does and did",
    """from engines engine
left join models model on model.digest = engine.model_digest
left join lateral (
    select array_agg(attempt.clip_id order by attempt.started_at) as clips
    from shards shard
    join clips clip on clip.shard_id = shard.id and clip.status = 'running'
    join attempts attempt on attempt.clip_id = clip.id and attempt.status = 'running'
    where shard.owner = engine.id and shard.status = 'leased'
) now on true""",
    engine_id=("engine.id", "owner of its leases; engine of ask.attempts and history"),
    state=(
        f"""case when engine.closed_at is not null then 'left'
        when engine.heartbeat_at < statement_timestamp() - interval '{ALIVE:.0f} seconds' then 'silent'
        when now.clips is not null then 'rendering' else 'idle' end""",
        f"rendering idle silent left; silent: no sign of life for {ALIVE:.0f} s",
    ),
    now_rendering=("coalesce(now.clips, '{}')", "the clips that it is at, those begun first before the others"),
    host=("engine.host", "where it runs"),
    device=("engine.device", "its device"),
    partition=("engine.partition", "how the model is split: cfg1xsp1xtp2"),
    gpus=(gpus_of("engine"), "ranks of that partition"),
    model=("model.name", "the model's name"),
    model_digest=("engine.model_digest", "sha256 over the model's files"),
    busy_share=(
        f"""(select sum({_SPENT}) from attempts attempt where attempt.engine = engine.id
            and attempt.started_at >= engine.started_at)
        / nullif(extract(epoch from coalesce(engine.closed_at, case when engine.heartbeat_at
            < statement_timestamp() - interval '{ALIVE:.0f} seconds' then engine.heartbeat_at
            else statement_timestamp() end) - engine.started_at), 0)::float8""",
        "engine time of its attempts, of the time it has lived; above 1 where stages of several clips overlap",
    ),
    started_at=("engine.started_at", "when it registered"),
    heartbeat_at=("engine.heartbeat_at", "its last sign of life"),
    ready_at=("engine.ready_at", "when it had loaded its model; empty where it failed without one clip"),
    closed_at=("engine.closed_at", "when it left"),
    error=("engine.error", "why it left, where not in order"),
    code_version=("engine.code_version", "of the engine"),
    pid=("engine.pid", "its process on the host"),
    flow_run_id=("engine.flow_run_id", "its flow run in Prefect"),
)

USAGE = _view(
    "usage",
    "one row per tenant, model and day (UTC): what all attempts took, failed and lost ones included",
    # By shards, of which there are fewer than clips, and first by partition: its digits are read once for each.
    f"""from (
    select request.tenant, request.model, (attempt.started_at at time zone 'UTC')::date as day, attempt.partition,
           sum({_SPENT}) as spent, count(*) as attempts,
           count(*) filter (where attempt.status = 'done') as rendered,
           sum({_SPENT}) filter (where attempt.status not in ('done', 'running')) as wasted
    from attempts attempt
    join shards shard on shard.id = attempt.shard_id
    join requests request on request.id = shard.request_id
    group by 1, 2, 3, 4
) part
group by part.tenant, part.model, part.day""",
    tenant=("part.tenant", "on whose account"),
    model=("part.model", "the model's name"),
    day=("part.day", "on which the attempts began"),
    gpu_seconds=(f"sum(part.spent * {gpus_of('part')})", "engine time times GPUs of all attempts"),
    wasted_gpu_seconds=(
        f"coalesce(sum(part.wasted * {gpus_of('part')}), 0)",
        "of them those of attempts that came to no clip",
    ),
    attempts=("sum(part.attempts)::bigint", "attempts begun"),
    rendered=("sum(part.rendered)::bigint", "attempts that came to a clip"),
)

LINEAGE = _view(
    "lineage",
    "one row per clip and clip that came from it, over any number of steps; quick by parent, by child it reads all",
    """from (select distinct parent from edges) ancestor
cross join lateral (
    with recursive family as (
        select edge.child, edge.kind, 1 as depth from edges edge where edge.parent = ancestor.parent
        union
        select edge.child, edge.kind, family.depth + 1 from family join edges edge on edge.parent = family.child
    )
    select child, kind, depth from family
) family""",
    parent=("ancestor.parent", "the clip that it came from"),
    child=("family.child", "the clip that was made; one that connects two clips has a row for each"),
    kind=(
        "family.kind::text",
        "how the last step used its source: image extend connect loop edit; take: another take of it",
    ),
    depth=("family.depth", "steps between the two: 1 is made from it directly"),
)

VIEWS = (HISTORY, REQUESTS, ATTEMPTS, STAGES_VIEW, ENGINES, USAGE, LINEAGE)
MAKE_SCHEMA = (f"create schema if not exists {SCHEMA}", f"comment on schema {SCHEMA} is '{_SCHEMA_MEANS}'")


def settle(connection: Connection, views: Sequence[View] = VIEWS) -> None:
    """Make the schema and the views that are missing, and those anew that are not as their lists say."""
    if connection.scalar(text("select obj_description(to_regnamespace(:name), 'pg_namespace')"),
                         {"name": SCHEMA}) != _SCHEMA_MEANS:  # fmt: skip
        for statement in MAKE_SCHEMA:
            connection.exec_driver_sql(statement)
    settle_views(connection, views)
