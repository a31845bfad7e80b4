"""The ledger's tables. Every rule that can be a constraint is one, with a line that says what it prevents.

Three rules carry the promise "nothing rendered twice, nothing lost":
- `clips.recipe` is unique among the clips that are planned or being rendered; `renders` holds one artifact a recipe;
- a shard's `attempt` goes up with every claim, and every write of an engine names the attempt it holds (leases.py);
- a clip is `done` exactly when it has an artifact, and an artifact row is only written after its bytes are stored.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from types import NoneType
from typing import Any, get_args, get_type_hints

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    Enum,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.settings import ClipSettings

PRIORITIES = (0, 9)  # least and most urgent
PRIORITY = 5  # of a request that says nothing
MAX_FAILURES = 3  # a clip whose renderings failed this often is poison and is put aside
MAX_LOST_ATTEMPTS = 6  # and so is one whose engines vanished this often: each of them may have had reasons of its own


class RequestStatus(StrEnum):
    OPEN = "open"
    PAUSED = "paused"  # nothing more of it is planned or claimed until it is resumed
    COMPLETED = "completed"
    COMPLETED_WITH_GAPS = "completed_with_gaps"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNENDED = (RequestStatus.OPEN, RequestStatus.PAUSED)


class ClipStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


ACTIVE = (ClipStatus.QUEUED, ClipStatus.RUNNING)
TERMINAL = tuple(status for status in ClipStatus if status not in ACTIVE)


class ShardStatus(StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    CANCELLED = "cancelled"


class AttemptStatus(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"  # its engine vanished, or a device failed; counts against the clip, but for less than a failure
    RELEASED = "released"  # its engine gave it back in order; does not count
    CANCELLED = "cancelled"
    GONE = "gone"  # was done, and the bytes that it made are lost since


class ClipMode(StrEnum):
    """The kind of a clip by its sources beside its words."""

    TEXT_TO_VIDEO = "text-to-video"
    IMAGE = "image"  # a single frame, from words alone
    IMAGE_TO_VIDEO = "image-to-video"
    EXTEND = "extend"
    CONNECT = "connect"
    LOOP = "loop"
    EDIT = "edit"


class ClipDirection(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"


class EdgeKind(StrEnum):
    IMAGE = "image"  # the child starts from a frame of the parent
    EXTEND = "extend"
    CONNECT = "connect"
    LOOP = "loop"
    EDIT = "edit"
    TAKE = "take"  # the child is another take of the parent, with something changed; no pixel of it was used


class CaptionOrigin(StrEnum):
    WORLD = "world"  # true by construction
    FILES = "files"  # came with the videos
    CAPTIONER = "captioner"  # written by a model's captioner
    VISION = "vision"  # written by a vision-language model


def _by_value(kind: type[StrEnum], name: str) -> Enum:
    return Enum(kind, name=name, values_callable=lambda members: [member.value for member in members])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own way to say it)
        str: Text,
        float: Double,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        RequestStatus: _by_value(RequestStatus, "request_status"),
        ClipStatus: _by_value(ClipStatus, "clip_status"),
        ShardStatus: _by_value(ShardStatus, "shard_status"),
        AttemptStatus: _by_value(AttemptStatus, "attempt_status"),
        EdgeKind: _by_value(EdgeKind, "edge_kind"),
        ClipMode: _by_value(ClipMode, "clip_mode"),
        ClipDirection: _by_value(ClipDirection, "clip_direction"),
        CaptionOrigin: _by_value(CaptionOrigin, "caption_origin"),
    }


_HEX64 = "{} ~ '^[0-9a-f]{{64}}$'"


class Model(Base):
    """Weights by the digest over all their files."""

    __tablename__ = "models"

    digest: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    path: Mapped[str | None]
    card: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))  # that it was trained on, if here


class Tenant(Base):
    """Whose account a request is on, and what share of the GPUs that is worth. Made at the first request."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(primary_key=True)
    weight: Mapped[float] = mapped_column(server_default=text("1"))  # GPU-seconds are shared in proportion to it
    max_clips: Mapped[int | None]  # that may wait or run at once; null: any number
    max_gpu_seconds: Mapped[float | None]  # in 24 hours; null: any number
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        # prevents a share that divides by nothing
        CheckConstraint("weight > 0 and weight < 'infinity'", name="weight"),
        CheckConstraint("max_clips >= 0 and max_gpu_seconds >= 0 and max_gpu_seconds < 'infinity'", name="quota"),
    )


class Usage(Base):
    """GPU-seconds that a tenant's leases took, by the minute: the sum of its parts.

    Leases that end at once add to different rows: a row stays locked until its transaction lies on the disk.
    """

    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    minute: Mapped[datetime] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    gpu_seconds: Mapped[float]

    __table_args__ = (
        CheckConstraint("gpu_seconds >= 0", name="gpu_seconds"),
        # prevents a look at the last minutes from reading the years before
        Index("ix_usage_minute", "minute", postgresql_include=["tenant", "gpu_seconds"]),
    )


def _labels(table: str) -> tuple[CheckConstraint | Index, ...]:
    """The rule for tags and metadata of a table, and the indexes that find them without reading all of it."""
    return (
        # prevents labels that are none: a row without any is in no index of them
        CheckConstraint(
            "cardinality(tags) > 0 and array_position(tags, null) is null and jsonb_typeof(metadata) = 'object'",
            name="labels",
        ),
        Index(f"ix_{table}_tags", "tags", postgresql_using="gin", postgresql_where=text("tags is not null")),
        Index(
            f"ix_{table}_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_where=text("metadata is not null"),
        ),
    )


class Request(Base):
    """A batch of prompts that somebody asked for."""

    __tablename__ = "requests"

    id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)  # prevents one submission from becoming two requests
    name: Mapped[str]
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))  # prevents work on nobody's account
    model: Mapped[str]
    model_digest: Mapped[str] = mapped_column(ForeignKey("models.digest"))  # prevents a request nobody can reproduce
    settings: Mapped[dict[str, Any]]
    source: Mapped[str]
    source_sha256: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text(str(PRIORITY)))
    deadline: Mapped[datetime | None]  # when all should be done
    asked: Mapped[int | None]  # clips announced when it was opened: what a quota counts before they are in
    status: Mapped[RequestStatus] = mapped_column(server_default=RequestStatus.OPEN.value)
    total: Mapped[int | None]  # null until all clips are in: nothing is planned or finished before that
    flow_run_id: Mapped[str | None]
    watched_at: Mapped[datetime | None]  # when its flow run last gave a sign of life
    tries: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))  # runs that took it up for nothing
    ended_before: Mapped[int] = mapped_column(server_default=text("0"))  # clips that had ended when the last one did
    carrier: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    trace_id: Mapped[str | None]
    manifest_key: Mapped[str | None]
    sheet_key: Mapped[str | None]
    tags: Mapped[list[str] | None]  # of all its clips; null: none
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB(none_as_null=True))  # of all its clips
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        # prevents a typo from jumping every queue
        CheckConstraint(f"priority between {PRIORITIES[0]} and {PRIORITIES[1]}", name="priority"),
        # prevents an id that was not made from the key by request_id()
        CheckConstraint("id ~ '^req_[0-9a-f]{12}$'", name="id"),
        CheckConstraint("total >= 0 and asked >= 0", name="total"),
        # prevents an end state without a time, and an open or paused request that says it ended
        CheckConstraint("(status in ('open', 'paused')) = (finished_at is null)", name="finished"),
        # prevents a claim from reading the closed requests of all time
        Index("ix_requests_open", "model_digest", postgresql_where=text("status = 'open'")),
        # prevents a tenant's quota from doing so
        Index("ix_requests_open_tenant", "tenant", postgresql_where=text("status in ('open', 'paused')")),
        Index("ix_requests_name", "name", "created_at"),
        Index("ix_requests_created_at", "created_at"),
        Index("ix_requests_flow_run_id", "flow_run_id"),
        *_labels("requests"),
    )


class Shard(Base):
    """A slice of one request, of one shape, that one engine leases."""

    __tablename__ = "shards"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"))
    status: Mapped[ShardStatus] = mapped_column(server_default=ShardStatus.QUEUED.value)
    priority: Mapped[int] = mapped_column(SmallInteger)
    width: Mapped[int]
    height: Mapped[int]
    frames: Mapped[int]
    size: Mapped[int]  # clips it was planned with
    partition: Mapped[str | None]  # the only one whose engines may claim it; null: any
    predicted_seconds: Mapped[float | None]  # of an engine, for all its clips
    predicted_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of memory, on the fullest rank
    avoid: Mapped[list[str] | None]  # engines on which its clips failed: another one goes first
    owner: Mapped[str | None]
    ranks: Mapped[int] = mapped_column(server_default=text("1"))  # of the engine that leased it last: its GPUs
    attempt: Mapped[int] = mapped_column(server_default=text("0"))  # the fence: up by one with every claim
    leased_until: Mapped[datetime | None]
    carrier: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    claimed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        # prevents a lease without an owner or an end, and an owner without a lease
        CheckConstraint(
            "(status = 'leased') = (owner is not null) and (owner is null) = (leased_until is null)", name="lease"
        ),
        # prevents a lease that no claim made, which no fence could tell apart
        CheckConstraint("attempt >= 1 or status not in ('leased', 'done')", name="attempt"),
        CheckConstraint("(status in ('done', 'cancelled')) = (finished_at is not null)", name="finished"),
        CheckConstraint("size >= 1 and ranks >= 1", name="size"),
        CheckConstraint("predicted_seconds > 0 and predicted_bytes > 0", name="predicted"),
        CheckConstraint(f"priority between {PRIORITIES[0]} and {PRIORITIES[1]}", name="priority"),
        # prevents a claim from reading finished shards: those that can be claimed, in the order they are
        Index(
            "ix_shards_active",
            "request_id",
            text("priority desc"),
            "id",
            postgresql_where=text("status in ('queued', 'leased')"),
        ),
        # prevents counting the live leases (fair share, expiry) from reading anything else
        Index("ix_shards_leased", "leased_until", postgresql_where=text("status = 'leased'")),
        Index("ix_shards_request_id", "request_id", "id"),
        # prevents the question when a request had its last lease from reading all of its shards
        Index("ix_shards_claimed_at", "request_id", "claimed_at"),
    )


class Artifact(Base):
    """Stored bytes under their digest. The row is written after the bytes."""

    __tablename__ = "artifacts"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)  # prevents two digests from claiming one object
    bytes: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lost_at: Mapped[datetime | None]  # when it was found that the store has these bytes no longer

    __table_args__ = (
        # prevents a name that is no digest: the audit hashes the bytes and compares
        CheckConstraint(_HEX64.format("sha256"), name="sha256"),
        # prevents an empty upload from counting as a clip
        CheckConstraint("bytes > 0", name="bytes"),
    )


class Clip(Base):
    """One video (or image) asked for: prompt, sample seed, settings (see `ClipSettings`); and what became of it."""

    __tablename__ = "clips"

    id: Mapped[str] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"))
    index: Mapped[int]
    sample: Mapped[int]
    custom_id: Mapped[str | None]
    line: Mapped[int | None]
    prompt: Mapped[str]
    rewritten_prompt: Mapped[str | None]
    not_understood: Mapped[str | None]
    unread_words: Mapped[int | None]
    negative_prompt: Mapped[str | None]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    recipe: Mapped[str | None]
    mode: Mapped[ClipMode] = mapped_column(server_default=ClipMode.TEXT_TO_VIDEO.value)
    source: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"))  # prevents a source that is not stored
    end_source: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"))
    direction: Mapped[ClipDirection | None]
    made_frames: Mapped[int | None]  # that go through the model, where that is not all of them once
    tags: Mapped[list[str] | None]  # the request's and the line's own; null: none
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB(none_as_null=True))  # likewise
    status: Mapped[ClipStatus] = mapped_column(server_default=ClipStatus.QUEUED.value)
    error: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))  # rows in `attempts`, ever
    failures: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))  # attempts since the last retry
    lost_attempts: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))  # with their engine, since then
    reused: Mapped[bool] = mapped_column(server_default=text("false"))  # done by a cached render
    rendered_by: Mapped[str | None] = mapped_column(ForeignKey("clips.id"))  # the clip that this render was made for
    fresh: Mapped[bool] = mapped_column(server_default=text("false"))  # a render from before it was queued will not do
    not_before: Mapped[datetime | None]  # a clip that failed waits a little before it is tried again
    resume_key: Mapped[str | None]  # object that holds its resume state: unfinished latents
    resume_step: Mapped[int | None]  # denoising steps that they have had
    resume_fingerprint: Mapped[str | None]  # of the kind of engine that goes on from there to the same bits
    seconds: Mapped[float | None]  # engine time of the rendering that made it
    shard_id: Mapped[int | None] = mapped_column(BigInteger, ForeignKey("shards.id"))
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"))  # prevents a done clip without bytes
    queued_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        # prevents a repeated add_clips from doubling a line
        UniqueConstraint("request_id", "index", "sample"),
        CheckConstraint('"index" >= 0 and sample >= 0', name="position"),
        # prevents a clip that no engine could render; a rejected line is kept as it came
        CheckConstraint(
            "status = 'rejected' or ("
            "num_nulls(width, height, frames, fps, steps, guidance, solver, shift, seed, recipe) = 0"
            " and prompt <> '' and width > 0 and height > 0 and frames > 0 and fps > 0 and steps > 0 and seed >= 0"
            " and guidance >= 0 and guidance < 'infinity' and shift > 0 and shift < 'infinity')",
            name="renderable",
        ),
        CheckConstraint(_HEX64.format("recipe"), name="recipe"),
        # prevents a mode without what it is made from, and sources that nobody would look at
        CheckConstraint(
            "status = 'rejected' or ("
            "(mode not in ('image-to-video', 'extend', 'connect', 'edit') or source is not null)"
            " and (mode not in ('text-to-video', 'image') or source is null)"
            " and (mode = 'connect') = (end_source is not null) and (mode = 'extend') = (direction is not null)"
            " and (mode = 'edit') = (strength is not null) and (strength is null or strength > 0 and strength <= 1))",
            name="mode",
        ),
        # prevents windows that take over more than they hold
        CheckConstraint('overlap >= 1 and "window" > overlap and made_frames >= 1', name="windows"),
        CheckConstraint("step_cache > 0 and step_cache < 'infinity'", name="step_cache"),
        CheckConstraint("guidance_2 >= 0 and guidance_2 < 'infinity'", name="guidance_2"),
        # prevents "done" without a video, and a video on a clip that is said to have none
        CheckConstraint("(status = 'done') = (artifact is not null)", name="done"),
        # prevents a rendering outside any lease
        CheckConstraint("status <> 'running' or (shard_id is not null and started_at is not null)", name="running"),
        # prevents an end state without a time, and an active clip that says it ended
        CheckConstraint("(status in ('queued', 'running')) = (finished_at is null)", name="finished"),
        # prevents a clip that ended badly from keeping its reason to itself
        CheckConstraint("status not in ('failed', 'quarantined', 'rejected') or error is not null", name="error"),
        # prevents a poison clip from being tried forever, and quarantine without cause
        CheckConstraint(
            f"failures between 0 and {MAX_FAILURES} and lost_attempts between 0 and {MAX_LOST_ATTEMPTS}"
            f" and (status = 'quarantined') = (failures = {MAX_FAILURES} or lost_attempts = {MAX_LOST_ATTEMPTS})",
            name="failures",
        ),
        # prevents a video of which nobody knows how it was made
        CheckConstraint("not reused or (status = 'done' and rendered_by is not null)", name="reused"),
        # prevents a finished clip from keeping a resume state, and one that nobody could go on from
        CheckConstraint(
            "(resume_key is null or status in ('queued', 'running')) and resume_step >= 1"
            " and num_nulls(resume_key, resume_step, resume_fingerprint) in (0, 3)",
            name="resume",
        ),
        # prevents one recipe from being rendered by two engines
        Index(
            "uq_clips_recipe_active",
            "recipe",
            unique=True,
            postgresql_where=text("status in ('queued', 'running') and shard_id is not null"),
        ),
        # prevents two lines of a request from answering to one custom_id
        Index(
            "uq_clips_custom_id",
            "request_id",
            "custom_id",
            "sample",
            unique=True,
            postgresql_where=text("custom_id is not null and status <> 'rejected'"),
        ),
        # prevents two clips from going on from the same latents
        Index("uq_clips_resume_key", "resume_key", unique=True, postgresql_where=text("resume_key is not null")),
        # prevents the planner from reading clips that are planned or finished: what is left, in file order
        Index(
            "ix_clips_unplanned",
            "request_id",
            "index",
            "sample",
            postgresql_where=text("status = 'queued' and shard_id is null"),
        ),
        # prevents the search for twins and cached renders from doing so
        Index(
            "ix_clips_unplanned_recipe",
            "request_id",
            "recipe",
            "index",
            "sample",
            postgresql_where=text("status = 'queued' and shard_id is null"),
        ),
        Index("ix_clips_shard_id", "shard_id", postgresql_where=text("shard_id is not null")),
        # prevents a question about the last day from reading the clips of all time
        Index("ix_clips_finished_at", "finished_at", postgresql_where=text("finished_at is not null")),
        Index("ix_clips_newest", text("queued_at desc"), "index", "sample"),
        *_labels("clips"),
        Index("ix_clips_artifact", "artifact", postgresql_where=text("artifact is not null")),
        # prevents the search for what was made from an artifact from reading all clips
        Index("ix_clips_source", "source", postgresql_where=text("source is not null")),
        # prevents the search for what ended badly from reading a whole request each time that one more did
        Index(
            "ix_clips_ended_badly",
            "request_id",
            "index",
            "sample",
            postgresql_where=text("status in ('failed', 'quarantined', 'rejected')"),
        ),
    )


def _add_settings() -> None:
    """One column a setting. All may be null: a rejected line is kept as it came, and may lack any."""
    types = {int: Integer, float: Double, str: Text}
    for name, hint in get_type_hints(ClipSettings).items():
        kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
        setattr(Clip, name, mapped_column(types[kind], nullable=True))


_add_settings()


class Tally(Base):
    """How many clips of a request came to a status, and how many left it: the sum of its rows is what there is now.

    A trigger on `clips` adds a row for every change, so that writers never wait for each other; `ledger.compact` sums
    them up.
    """

    __tablename__ = "tallies"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    request_id: Mapped[str]  # of a clip that is there, so a foreign key would only cost time
    status: Mapped[ClipStatus]
    clips: Mapped[int]
    reused: Mapped[int]
    rendered: Mapped[int]  # done and not reused
    seconds: Mapped[float]  # of the rendered ones
    bytes: Mapped[int] = mapped_column(BigInteger)  # of their files
    started_at: Mapped[datetime | None]  # the first of them

    __table_args__ = (Index("ix_tallies_request_id", "request_id"),)


class Attempt(Base):
    """One try at one clip."""

    __tablename__ = "attempts"

    clip_id: Mapped[str] = mapped_column(ForeignKey("clips.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    shard_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("shards.id"))
    shard_attempt: Mapped[int]  # the fence it was started under
    owner: Mapped[str]
    engine: Mapped[str]
    partition: Mapped[str]
    code_version: Mapped[str]
    status: Mapped[AttemptStatus] = mapped_column(server_default=AttemptStatus.RUNNING.value)
    error: Mapped[str | None]
    error_class: Mapped[str | None]  # what kind of failure: rank_died, not_finite, bad_input …
    host: Mapped[str | None]
    resumed_step: Mapped[int | None]  # that it went on from, where an earlier attempt had come so far
    text_seconds: Mapped[float | None]
    denoise_seconds: Mapped[float | None]
    decode_seconds: Mapped[float | None]
    encode_seconds: Mapped[float | None]
    put_seconds: Mapped[float | None]
    skipped_steps: Mapped[int | None]  # that a step cache answered
    peak_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of memory, on the fullest rank
    trace_id: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint("number >= 1", name="number"),
        CheckConstraint("skipped_steps >= 0 and peak_bytes > 0 and resumed_step >= 1", name="measured"),
        # prevents a failure of no kind
        CheckConstraint("status <> 'failed' or error_class is not null", name="error_class"),
        CheckConstraint("(status = 'running') = (finished_at is null)", name="finished"),
        # prevents two engines from being at one clip
        Index("uq_attempts_running", "clip_id", unique=True, postgresql_where=text("status = 'running'")),
        Index("ix_attempts_engine", "engine", "started_at"),
        # prevents a question about some days from reading the attempts of all time: a few bytes for each 32 pages
        Index(
            "ix_attempts_started_at",
            "started_at",
            text("((started_at at time zone 'UTC')::date)"),
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 32, "autosummarize": "on"},
        ),
    )


class Render(Base):
    """Cached render, recipe → artifact: reused by every clip that asks for the same pixels."""

    __tablename__ = "renders"

    recipe: Mapped[str] = mapped_column(primary_key=True)  # prevents a second rendering of a recipe from counting
    sha256: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"))
    clip_id: Mapped[str] = mapped_column(ForeignKey("clips.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(_HEX64.format("recipe"), name="recipe"),
        Index("ix_renders_sha256", "sha256"),
    )


class Reproduction(Base):
    """A clip rendered once more, on some partition, and how far its frames are from the stored ones."""

    __tablename__ = "reproductions"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    clip_id: Mapped[str] = mapped_column(ForeignKey("clips.id"))
    partition: Mapped[str]
    device: Mapped[str]
    code_version: Mapped[str]
    step_cache: Mapped[float | None]  # with which it was rendered this time
    sha256: Mapped[str]  # of the file that came of it, which is not kept
    identical: Mapped[bool]
    psnr: Mapped[float | None]  # dB; null where nothing differs
    largest: Mapped[int]  # difference of any value, of 255
    seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(_HEX64.format("sha256"), name="sha256"),
        # prevents a rendering from being called the same while something differs
        CheckConstraint(
            "largest between 0 and 255 and identical = (largest = 0) and identical = (psnr is null)", name="drift"
        ),
        Index("ix_reproductions_clip_id", "clip_id", "id"),
    )


class Engine(Base):
    """A process that leases shards (with its ranks); `id` is the owner of its leases."""

    __tablename__ = "engines"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str]
    partition: Mapped[str]
    model_digest: Mapped[str]
    code_version: Mapped[str]
    flow_run_id: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())
    closed_at: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]  # its model was loaded; null again where it then failed without one clip
    error: Mapped[str | None]  # why it ended, where not in order

    __table_args__ = (Index("ix_engines_live", "heartbeat_at", postgresql_where=text("closed_at is null")),)


class Edge(Base):
    """Which clip came from which."""

    __tablename__ = "edges"

    child: Mapped[str] = mapped_column(ForeignKey("clips.id"), primary_key=True)
    parent: Mapped[str] = mapped_column(ForeignKey("clips.id"), primary_key=True)
    kind: Mapped[EdgeKind] = mapped_column(primary_key=True)

    __table_args__ = (
        # prevents the shortest circle
        CheckConstraint("child <> parent", name="loop"),
        Index("ix_edges_parent", "parent"),
    )


class Rewrite(Base):
    """A prompt as a rewriter wrote it."""

    __tablename__ = "rewrites"

    key: Mapped[str] = mapped_column(primary_key=True)  # prevents one question from having two answers
    rewriter: Mapped[str]
    prompt: Mapped[str]
    moving: Mapped[bool]  # false: for an image
    rewritten: Mapped[str | None]  # null: left as it is
    not_understood: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(_HEX64.format("key"), name="key"),
        # prevents a clip of nothing
        CheckConstraint("rewritten <> ''", name="rewritten"),
    )


class Dataset(Base):
    """Training data of models: the clips of the world or of a folder, with captions. Sealed, it never changes.

    New captions make a new data set whose `parent` keeps the old ones.
    """

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)  # prevents one data set from being written down twice
    name: Mapped[str]
    source: Mapped[str]  # world, or the uri of a folder
    licence: Mapped[str | None]
    seed: Mapped[int | None] = mapped_column(BigInteger)  # of the world
    fps: Mapped[int]
    captions: Mapped[CaptionOrigin]
    # who wrote the captions: digest of a captioner, or a vision-language model and a digest of what it was asked
    author: Mapped[str | None]
    parent: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))  # prevents the old captions from going
    digest: Mapped[str | None]  # null until all clips are in: nothing is trained on before that
    clips: Mapped[int | None]
    shapes: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))  # clips of each
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    sealed_at: Mapped[datetime | None]

    __table_args__ = (
        # prevents an id that was not made from the key by dataset_id()
        CheckConstraint("id ~ '^set_[0-9a-f]{12}$'", name="id"),
        CheckConstraint(_HEX64.format("digest"), name="digest"),
        # prevents a half-written data set from passing for a whole one
        CheckConstraint("num_nulls(digest, clips, sealed_at) in (0, 3) and clips > 0", name="sealed"),
        # prevents captions of a model without saying of which, and of which clips
        CheckConstraint(
            "(captions in ('captioner', 'vision')) = (author is not null) and (author is null) = (parent is null)",
            name="author",
        ),
        CheckConstraint("(source = 'world') = (seed is not null)", name="seed"),
        CheckConstraint("fps > 0", name="fps"),
        Index("ix_datasets_name", "name", "created_at"),
        Index("ix_datasets_digest", "digest"),
    )


class DatasetClip(Base):
    """One clip of a data set: which stretch of which file it is, and its caption."""

    __tablename__ = "dataset_clips"

    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True)  # the same in every recaptioned child
    file: Mapped[str]  # below the source; of the world: shape/number
    sha256: Mapped[str]  # of the file; of the world: of the scene
    start: Mapped[int]  # first frame, at the data set's fps
    width: Mapped[int]
    height: Mapped[int]
    frames: Mapped[int]
    caption: Mapped[str]  # '' where nobody wrote one

    __table_args__ = (
        CheckConstraint('"index" >= 0 and start >= 0', name="position"),
        CheckConstraint(_HEX64.format("sha256"), name="sha256"),
        CheckConstraint("width > 0 and height > 0 and frames > 0", name="shape"),
    )
