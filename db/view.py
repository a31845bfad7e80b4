"""Views made from lists of their columns; and `history`, one row per clip with everything about it.

A column of `history` is a field of `HistoryRow` or of `ClipSettings`. Every upgrade ends with `settle_views`, so a
migration that adds one does not repeat the others; one that changes a column which a view reads drops the view first.
What a column means is said once, here: it is the column's comment in the database too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from db.settings import SETTINGS, ClipSettings
from db.tables import ClipDirection, ClipMode, ClipStatus

_PARENTS = """array(select edge.parent from edges edge where edge.child = clip.id
        group by edge.parent order by min(edge.kind), edge.parent)"""
# In the list of columns and not among the tables, so that who does not ask for it does not wait for it.
_AGAIN = "(select {} from reproductions again where again.clip_id = clip.id)"
_DIGITS = r"substring({}.partition from '{}([0-9]+)')::integer"


def gpus_of(table: str) -> str:
    """SQL: the GPUs of the partition that a row names, such as cfg1xsp1xtp2; 1 where it is none of ours."""
    return f"coalesce({' * '.join(_DIGITS.format(table, axis) for axis in ('cfg', 'sp', 'tp'))}, 1)"


_RENDERED_BY = "case when clip.reused then clip.rendered_by when clip.status = 'done' then clip.id end"


@dataclass(frozen=True, slots=True)
class ViewColumn:
    """A column of a view: its meaning, the expression that it selects, its SQL type."""

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
    not_understood: Annotated[str | None, "words and phrases that rewriting left out"]
    unread_words: Annotated[int | None, "words at its end that the model did not read, where it is too long"]
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
    rendered_by: Annotated[
        str | None, ViewColumn("the clip whose rendering it is; engine, stages … are of that one", _RENDERED_BY)
    ]
    engine: Annotated[str | None, ViewColumn("who made the last attempt", "last.engine")]
    partition: Annotated[str | None, ViewColumn("how the model was split: cfg1xsp1xtp2", "last.partition")]
    code_version: Annotated[str | None, ViewColumn("of the engine", "last.code_version")]
    text_seconds: Annotated[float | None, ViewColumn("encoding the prompt", "last.text_seconds")]
    denoise_seconds: Annotated[float | None, ViewColumn("the denoising loop", "last.denoise_seconds")]
    decode_seconds: Annotated[float | None, ViewColumn("latents to frames", "last.decode_seconds")]
    encode_seconds: Annotated[float | None, ViewColumn("frames to MP4 or PNG", "last.encode_seconds")]
    put_seconds: Annotated[float | None, ViewColumn("storing the bytes", "last.put_seconds")]
    seconds: Annotated[
        float | None, ViewColumn("engine time: the sum of the five stages", "coalesce(clip.seconds, maker.seconds)")
    ]
    gpu_seconds: Annotated[
        float | None,
        ViewColumn(
            "seconds times the GPUs of the partition; 0 for a reused clip, so that sums count each rendering once",
            f"case when clip.reused then 0 else clip.seconds * {gpus_of('last')} end",
        ),
    ]
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
    parents: Annotated[list[str], ViewColumn("the clips it was made from; see ask.lineage", _PARENTS, ARRAY(Text))]
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
    reproductions: Annotated[
        int, ViewColumn("times it was rendered again to compare", _AGAIN.format("count(*)::integer"))
    ]
    lowest_psnr: Annotated[float | None, ViewColumn("dB, of those that differed", _AGAIN.format("min(again.psnr)"))]
    largest_difference: Annotated[
        int | None, ViewColumn("of any value of 255 in any of them", _AGAIN.format("max(again.largest)"))
    ]
    priority: Annotated[int, ViewColumn("of its request: 0 to 9, higher goes first", "request.priority::integer")]
    deadline: Annotated[datetime | None, ViewColumn("when its request should be done", "request.deadline")]
    fresh: Annotated[bool, "a render from before it was queued would not do"]
    host: Annotated[str | None, ViewColumn("where the last attempt was made", "last.host")]
    error_class: Annotated[str | None, ViewColumn("what kind of failure the last attempt was", "last.error_class")]
    resumed_step: Annotated[
        int | None,
        ViewColumn("that the last attempt went on from, where an earlier one had come so far", "last.resumed_step"),
    ]
    tags: Annotated[
        list[str] | None, ViewColumn("its request's and its line's own; null where it has none", kind=ARRAY(Text))
    ]
    metadata: Annotated[
        dict[str, Any] | None, ViewColumn("a JSON object: its request's, and its line's own over that", kind=JSONB)
    ]

    def columns(self) -> dict[str, Any]:
        """The values by the names of the view's columns, in their order."""
        return {
            name: getattr(self.settings, _SETTINGS[name], None) if name in _SETTINGS else getattr(self, name)
            for name in COLUMNS
        }


# Names of the view's columns to settings: `window` is a reserved word, which everybody would have to quote.
_SETTINGS = {"window_frames" if name == "window" else name: name for name in SETTINGS}


_KINDS: dict[Any, Any] = {
    **{int: Integer, float: Double, str: Text, bool: Boolean, datetime: DateTime(timezone=True)},
    **dict.fromkeys((ClipStatus, ClipMode, ClipDirection), Text),
}


def _columns() -> dict[str, ViewColumn]:
    hints = get_type_hints(HistoryRow, include_extras=True)
    settings = get_type_hints(ClipSettings, include_extras=True)
    columns: dict[str, ViewColumn] = {}
    for name, hint in hints.items():
        some = {name: hint} if name != "settings" else {shown: settings[each] for shown, each in _SETTINGS.items()}
        for column, annotated in some.items():
            optional, described = get_args(annotated)
            own = next(kind for kind in get_args(optional) or (optional,) if kind is not NoneType)
            shown = ViewColumn(described) if isinstance(described, str) else described
            own_name = f'clip."{_SETTINGS.get(column, column)}"'
            columns[column] = ViewColumn(shown.means, shown.sql or own_name, shown.kind or _KINDS[own])
    return columns


COLUMNS: Mapping[str, ViewColumn] = MappingProxyType(_columns())
# In a MetaData of its own: a view is no table that migrations would create.
history = Table("history", MetaData(), *(Column(name, column.kind) for name, column in COLUMNS.items()))


def row_of(values: Mapping[str, Any]) -> HistoryRow:
    """A row from the values of the view's columns by name."""
    rest = {name: value for name, value in values.items() if name not in _SETTINGS}
    rest["status"], rest["mode"] = ClipStatus(rest["status"]), ClipMode(rest["mode"])
    rest["direction"] = rest["direction"] and ClipDirection(rest["direction"])
    given = {name: values[shown] for shown, name in _SETTINGS.items()}
    return HistoryRow(settings=ClipSettings(**given) if values["width"] is not None else None, **rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A view: what a row is, its columns by name, and where they are selected from."""

    name: str  # with its schema, where that is not public
    means: str
    columns: Mapping[str, ViewColumn]
    source: str  # what follows the columns: from …

    @property
    def query(self) -> str:
        shown = ",\n    ".join(f'{column.sql} as "{name}"' for name, column in self.columns.items())
        return f"select\n    {shown}\n{self.source}"

    @property
    def comment(self) -> str:
        """The meaning of a row, and a digest of everything that the view is made of: by it `settle_views` knows it."""
        made_of = repr((self.query, self.means, [column.means for column in self.columns.values()]))
        return f"{self.means} [{hashlib.sha256(made_of.encode()).hexdigest()[:12]}]"

    @property
    def remake(self) -> Sequence[str]:
        """The statements that make it in place of the one there is."""
        return (
            f"drop view if exists {self.name}",
            f"create view {self.name} as\n{self.query}",
            f"comment on view {self.name} is {_quoted(self.comment)}",
            *(
                f'comment on column {self.name}."{name}" is {_quoted(column.means)}'
                for name, column in self.columns.items()
            ),
        )


def _quoted(words: str) -> str:
    return "'" + words.replace("'", "''") + "'"


HISTORY = View(
    name="history",
    means="one row per clip, with everything about it",
    columns=COLUMNS,
    source="""from clips clip
join requests request on request.id = clip.request_id
left join clips maker on clip.reused and maker.id = clip.rendered_by
left join attempts last on last.clip_id = coalesce(maker.id, clip.id)
    and last.number = coalesce(maker.attempts, clip.attempts)
left join artifacts artifact on artifact.sha256 = clip.artifact
left join shards shard on shard.id = clip.shard_id""",
)


def settle_views(connection: Connection, views: Sequence[View]) -> None:
    """Make those views anew that are not there as they should be: by their comments, which hold a digest of it."""
    for view in views:
        there = text("select obj_description(to_regclass(:name), 'pg_class')")
        if connection.scalar(there, {"name": view.name}) != view.comment:
            for statement in view.remake:
                connection.exec_driver_sql(statement.replace("%", "%%"))
