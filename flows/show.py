"""Prints rows for people (a table), programs (JSON) and spreadsheets (CSV), and puts a picture into an address.

Rows are dicts and may come one by one: JSON and CSV are written as they come, so a listing of a million clips needs no
memory. Values of clips are data, never markup or terminal commands: control characters are shown, not obeyed.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Format = Literal["table", "json", "csv"]
Row = Mapping[str, Any]

# Characters of a picture's address, at most: Prefect keeps it twice, in the artifact and in an event.
ADDRESS = 200_000
SIDE = 4096  # pixels of a picture in an address, at most; WebP ends at 16,383

COLOUR = {
    "done": "green",
    "completed": "green",
    "ok": "green",
    "running": "cyan",
    "leased": "cyan",
    "open": "cyan",
    "completed_with_gaps": "yellow",
    "cancelled": "yellow",
    "rejected": "red",
    "failed": "red",
    "quarantined": "red",
    "wrong": "red",
}


def show_rows(rows: Iterable[Row], columns: Sequence[str], format: Format, *, title: str | None = None) -> int:
    """Write rows to standard output and return how many there were. `columns` are keys and headings."""
    if format == "json":
        return _json(rows, columns)
    if format == "csv":
        return _csv(rows, columns)
    return _table(rows, columns, title)


def show_one(values: Row, format: Format, *, title: str | None = None) -> None:
    """Write one thing's values to standard output: a table of two columns, a JSON object, or a CSV with one row."""
    if format == "json":
        sys.stdout.write(json.dumps({key: plain(value) for key, value in values.items()}, indent=2) + "\n")
    elif format == "csv":
        _csv([values], list(values))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title and Text(title), show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, value in values.items():
            if value is not None:
                table.add_row(key, _cell(key, value))
        _print(table)


def _print(table: Any) -> None:
    """Print a table; into a pipe without the spaces that pad it to a screen's width."""
    screen = console()
    if screen.is_terminal:
        screen.print(table)
        return
    with screen.capture() as captured:
        screen.print(table)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().strip("\n").splitlines()))


def console(*, stderr: bool = False) -> Console:
    """A rich console that never cuts or wraps what goes into a pipe."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=10_000)
    return made


@contextmanager
def terminal_bars(*fields: str) -> Generator[Progress | None]:
    """Progress bars on standard error, with text columns of these fields behind them; None where it is no terminal."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = (TextColumn(f"{{task.fields[{field}]}}") for field in fields)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *shown
    with Progress(*columns, console=screen, transient=True) as bars:
        yield bars


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return str(value)


def text(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.6g}"
    value = plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """The text with control characters made visible: a prompt must not be able to move the cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _cell(column: str, value: Any) -> Any:
    from rich.text import Text

    shown = text(value)
    style = COLOUR.get(shown, "") if column in ("status", "check", "state") else ""
    return Text(shown, style=style)


def _table(rows: Iterable[Row], columns: Sequence[str], title: str | None) -> int:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(box=box.SIMPLE_HEAD, title=title and Text(title), title_justify="left", pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | Decimal | None) for row in rows)
        table.add_column(Text(column), overflow="fold", justify="right" if numeric and rows else "left")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    _print(table)
    return len(rows)


def _json(rows: Iterable[Row], columns: Sequence[str]) -> int:
    """An array with an object a line: whole it is JSON, and line tools can still read it."""
    count = 0
    for row in rows:
        sys.stdout.write("[\n" if not count else ",\n")
        sys.stdout.write(json.dumps({column: plain(row.get(column)) for column in columns}, ensure_ascii=False))
        count += 1
    sys.stdout.write("\n]\n" if count else "[]\n")
    return count


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    count = 0
    for row in rows:
        writer.writerow([_csv_cell(row.get(column)) for column in columns])
        count += 1
    return count


def _csv_cell(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


def picture_address(data: bytes) -> str:
    """A PNG as an address that holds the picture itself, of at most ADDRESS characters.

    One that is larger becomes a WebP, smaller in its sides where it must be.
    """
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    if len(address) <= ADDRESS:
        return address
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        whole = picture.convert("RGB")
    scale = min(1.0, SIDE / max(whole.size))
    while len(address) > ADDRESS:
        small = whole.resize((max(1, round(whole.width * scale)), max(1, round(whole.height * scale))))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=80)
        address = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        scale *= min(0.9, math.sqrt(ADDRESS / len(address)))
    return address
