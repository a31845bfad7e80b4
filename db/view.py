"""The view `history`, one row per clip with everything about it, made from one list of its columns.

A column is a field of `HistoryRow` or of `ClipSettings`. Every upgrade ends with `settle_history`, so a migration that
adds one does not repeat the others; one that changes a column which the view reads drops the view first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType, NoneType
from typing import Annotated, Any, get_args, get_type_hints

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Double,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)

from db.settings import SETTINGS, ClipSettings
from db.tables import ClipDirection, ClipMode, ClipStatus

_PARENT = "(select edge.parent from edges edge where edge.child = clip.id order by edge.kind, edge.parent limit 1)"


@dataclass(frozen=True, slots=True)
class ViewColumn:
    """A column of the view: its meaning, the expression that it selects, its SQL type."""

    means: str
    sql: str = ""  # empty: the column of `clips` that has its name
    kind: Any = None  # None: the one that belongs to the field's own type


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """A row of the view. A text beside a type says what a column of `clips` means."""

    request_id: Annotated[str, "the request it belongs to"]
    request_name: Annotated[str, ViewColumn("the request's name", "request.name")]
    clip_id: Annotated[str, ViewColumn("request id, line index and sample: req_…-000011-0", "clip.id")]
    custom_id: Annotated[str | None, "the submitter's own id for the line, if there was one"]
    index: Annotated[int, "position of its line in the prompt file, from 0"]
    sample: Annotated[int, "which of the line's samples, from 0"]
    tenant: Annotated[str, ViewColumn("who asked", "request.tenant")]
    prompt: Annotated[str, "the words as they came"]
    rewritten_prompt: Annotated[str | None, "the words the model was given, where they differ"]
    negative_prompt: Annotated[str | None, "what the clip should not show"]
    model: Annotated[str, ViewColumn("the model's name", "request.model")]
    model_digest: Annotated[str, ViewColumn("sha256 over the model's files", "request.model_digest")]
    settings: ClipSettings | None  # a column each; None: a line that was rejected
    seed: Annotated[int | None, ViewColumn("of the noise", kind=BigInteger)]
    recipe: Annotated[str | None, "sha256 of all that determines the pixels: equal recipes share one rendering"]
    status: Annotated[
        ClipStatus, ViewColumn("queued running done failed quarantined cancelled rejected", "clip.status::text")
    ]
    error: Annotated[str | None, "why it failed, last failed, or was rejected"]
    attempts: Annotated[int, "attempts, ever"]
    reused: Annotated[bool, "done by a cached render, not rendered again"]
    engine: Annotated[str | None, ViewColumn("who made the last attempt", "last.engine")]
    partition: Annotated[str | None, ViewColumn("how the model was split: cfg1xsp1xtp2", "last.partition")]
    code_version: Annotated[str | None, ViewColumn("of the engine", "last.code_version")]
    text_seconds: Annotated[float | None, ViewColumn("encoding the prompt", "last.text_seconds")]
    denoise_seconds: Annotated[float | None, ViewColumn("the denoising loop", "last.denoise_seconds")]
    decode_seconds: Annotated[float | None, ViewColumn("latents to frames", "last.decode_seconds")]
    encode_seconds: Annotated[float | None, ViewColumn("frames to MP4 or PNG", "last.encode_seconds")]
    put_seconds: Annotated[float | None, ViewColumn("storing the bytes", "last.put_seconds")]
    seconds: Annotated[float | None, "engine time: the sum of the five stages"]
    queued_at: Annotated[datetime, "when it was added"]
    started_at: Annotated[datetime | None, "when its last attempt began"]
    finished_at: Annotated[datetime | None, "when it reached its end state"]
    object_key: Annotated[str | None, ViewColumn("where its bytes lie in the store", "artifact.key")]
    sha256: Annotated[str | None, ViewColumn("of its bytes", "artifact.sha256")]
    bytes: Annotated[int | None, ViewColumn("their number", "artifact.bytes", BigInteger)]
    media_type: Annotated[str | None, ViewColumn("video/mp4 or image/png", "artifact.media_type")]
    trace_id: Annotated[
        str | None, ViewColumn("of the rendering, else of the request", "coalesce(last.trace_id, request.trace_id)")
    ]
    parent_clip_id: Annotated[
        str | None, ViewColumn("the clip it was made from; of several the first, see edges", _PARENT)
    ]
    line: Annotated[int | None, "of the prompt file, from 1"]
    flow_run_id: Annotated[str | None, ViewColumn("the Prefect flow run of its request", "request.flow_run_id")]
    shard_id: Annotated[int | None, ViewColumn("the shard it was last part of", kind=BigInteger)]
    mode: Annotated[
        ClipMode, ViewColumn("text-to-video image image-to-video extend connect loop edit", "clip.mode::text")
    ]
    source_sha256: Annotated[str | None, ViewColumn("of what it was made from", "clip.source")]
    end_source_sha256: Annotated[str | None, ViewColumn("of what it leads to", "clip.end_source")]
    direction: Annotated[ClipDirection | None, ViewColumn("of an extension: forward backward", "clip.direction::text")]
    made_frames: Annotated[int | None, "frames that went through the model, where that is not all of them once"]
    predicted_seconds: Annotated[
        float | None,
        ViewColumn(
            "engine time, as it was predicted when its shard was planned", "shard.predicted_seconds / shard.size"
        ),
    ]
    predicted_bytes: Annotated[
        int | None, ViewColumn("memory on the fullest rank, predicted", "shard.predicted_bytes", BigInteger)
    ]
    peak_bytes: Annotated[int | None, ViewColumn("memory on the fullest rank, measured", "last.peak_bytes", BigInteger)]
    skipped_steps: Annotated[int | None, ViewColumn("steps that the step cache answered", "last.skipped_steps")]
    reproductions: Annotated[int, ViewColumn("times it was rendered again to compare", "again.reproductions")]
    lowest_psnr: Annotated[float | None, ViewColumn("dB, of those that differed", "again.psnr")]
    largest_difference: Annotated[int | None, ViewColumn("of any value of 255 in any of them", "again.largest")]
    priority: Annotated[int, ViewColumn("of its request: 0 to 9, higher goes first", "request.priority::integer")]
    deadline: Annotated[datetime | None, ViewColumn("when its request should be done", "request.deadline")]
    fresh: Annotated[bool, "a render from before it was queued would not do"]
    host: Annotated[str | None, ViewColumn("where the last attempt was made", "last.host")]
    error_class: Annotated[str | None, ViewColumn("what kind of failure the last attempt was", "last.error_class")]
    resumed_step: Annotated[
        int | None,
        ViewColumn("that the last attempt went on from, where an earlier one had come so far", "last.resumed_step"),
    ]

    def columns(self) -> dict[str, Any]:
        """The values by the names of the view's columns, in their order."""
        return {
            name: getattr(self.settings, name, None) if name in SETTINGS else getattr(self, name) for name in COLUMNS
        }


_KINDS: dict[Any, Any] = {
    **{int: Integer, float: Double, str: Text, bool: Boolean, datetime: DateTime(timezone=True)},
    **dict.fromkeys((ClipStatus, ClipMode, ClipDirection), Text),
}


def _columns() -> dict[str, ViewColumn]:
    hints = get_type_hints(HistoryRow, include_extras=True)
    settings = get_type_hints(ClipSettings, include_extras=True)
    columns: dict[str, ViewColumn] = {}
    for name, hint in hints.items():
        some = {name: hint} if name != "settings" else {each: settings[each] for each in SETTINGS}
        for column, annotated in some.items():
            optional, described = get_args(annotated)
            own = next(kind for kind in get_args(optional) or (optional,) if kind is not NoneType)
            shown = ViewColumn(described) if isinstance(described, str) else described
            columns[column] = ViewColumn(shown.means, shown.sql or f'clip."{column}"', shown.kind or _KINDS[own])
    return columns


COLUMNS: Mapping[str, ViewColumn] = MappingProxyType(_columns())
# In a MetaData of its own: a view is no table that migrations would create.
history = Table("history", MetaData(), *(Column(name, column.kind) for name, column in COLUMNS.items()))


def row_of(values: Mapping[str, Any]) -> HistoryRow:
    """A row from the values of the view's columns by name."""
    rest = {name: value for name, value in values.items() if name not in SETTINGS}
    rest["status"], rest["mode"] = ClipStatus(rest["status"]), ClipMode(rest["mode"])
    rest["direction"] = rest["direction"] and ClipDirection(rest["direction"])
    settings = ClipSettings(**{name: values[name] for name in SETTINGS}) if values["width"] is not None else None
    return HistoryRow(settings=settings, **rest)


_SELECTED = ",\n    ".join(f'{column.sql} as "{name}"' for name, column in COLUMNS.items())
HISTORY = f"""create view history as
select
    {_SELECTED}
from clips clip
join requests request on request.id = clip.request_id
left join attempts last on last.clip_id = clip.id and last.number = clip.attempts
left join artifacts artifact on artifact.sha256 = clip.artifact
left join shards shard on shard.id = clip.shard_id
left join lateral (
    select count(*)::integer as reproductions, min(psnr) as psnr, max(reproductions.largest) as largest
    from reproductions
    where reproductions.clip_id = clip.id
) again on true"""
_STAMP = hashlib.sha256(HISTORY.encode()).hexdigest()
REMAKE = ("drop view if exists history", HISTORY, f"comment on view history is '{_STAMP}'")


def settle_history(connection: Connection) -> None:
    """Make the view anew where it is not what `HISTORY` says; by its comment, which holds the digest of that."""
    if connection.scalar(text("select obj_description(to_regclass('history'), 'pg_class')")) != _STAMP:
        for statement in REMAKE:
            connection.exec_driver_sql(statement)
