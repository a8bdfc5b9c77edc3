"""Tables for humans, as a terminal or a pipe can take them, and JSON documents for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from .context import say
from .progress import hidden

_Function = Callable[..., Any]


def json_option(function: _Function) -> _Function:
    """--json: one JSON document on stdout in the place of text."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead, for programs."
    )(function)


def say_json(document: object) -> None:
    """The answer of a command with --json."""
    say(json.dumps(document, indent=2, ensure_ascii=False))


def warn(text: str) -> None:
    """Something beside the answer, on stderr; there is nobody to tell if that fails."""
    with hidden(), suppress(OSError):
        click.echo(text, err=True)


def on_terminal() -> bool:
    """Whether a human reads stdout there and then."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table under its title: drawn on a terminal, aligned columns of text in a pipe."""
    if on_terminal():
        _draw(title, columns, rows)
        return
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    say(title)
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say(f"  {'  '.join(cells).rstrip()}")


def say_styled(text: str, style: str) -> None:
    """A line, in a style where a terminal shows it (never with NO_COLOR)."""
    if on_terminal() and not os.environ.get("NO_COLOR"):
        text = click.style(text, **_STYLES[style])
    say(text)


def say_list(heading: str, lines: Sequence[str], style: str) -> None:
    """Lines below a heading; nothing without lines."""
    if lines:
        say_styled(heading, style)
    for line in lines:
        say(f"  {line}")


_STYLES: dict[str, dict[str, Any]] = {
    "good": {"fg": "green"},
    "warning": {"fg": "yellow", "bold": True},
    "bad": {"fg": "red", "bold": True},
}


def _draw(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_coloured(Text(cell)) for cell in row))
    Console(highlight=False).print(table)


def _coloured(text: Any) -> Any:
    """States of servers in the colours in which one looks for them."""
    word = text.plain.split(" ")[0].rstrip(",")
    if word in ("running", "ok", "Active"):
        text.stylize("green")
    elif word in ("crashed", "fail"):
        text.stylize("red")
    elif word in ("stopped", "warn", "starting", "stopping", "silent"):
        text.stylize("yellow")
    return text
