"""What the commands share for talking to a person or a script. Rich is imported inside, where something is shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from genkit.eval.extract import Progress

STATES = {"ok": "green", "note": "yellow", "broken": "bold red"}  # colours of the findings of `genkit doctor`


def say_error(text: str) -> None:
    """Write one line to stderr."""
    print(f"genkit: error: {text}", file=sys.stderr)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json` to a command."""
    parser.add_argument("--json", action="store_true", help="print JSON for a script instead of text")


def print_json(value: Any) -> None:
    """Print a value as indented JSON; paths and other objects become their text."""
    print(json.dumps(value, indent=2, default=str))


def console() -> Console:
    """Return a console on stdout that does not wrap or colour what goes into a pipe."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, soft_wrap=True, width=wide)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text under column names, without a frame."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=STATES.get(cell, "")) for cell in row))
    console().print(table)


def bytes_text(count: float) -> str:
    """Return a number of bytes in the unit a person reads: `8.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, of an option."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from None


def positive(text: str) -> int:
    """Parse a whole number of at least 1 (an argparse type)."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextmanager
def progress_bar(show: bool, text: str) -> Iterator[Progress | None]:
    """Show what is done, pictures per second and the time left, on a terminal; a count that falls begins a new bar."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {"done": 0}

        def advance(done: int, total: int, seconds: float) -> None:
            if "id" not in tasks or done < tasks["done"]:
                tasks["id"] = bar.add_task(text, total=total, rate="")
            tasks["done"] = done
            bar.update(tasks["id"], completed=done, rate=f"{done / max(seconds, 1e-9):.1f} images/s")

        yield advance
