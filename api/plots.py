"""Small plots for the terminal: a line of what came over time, a bar of which part is here.

One line of text each. Colours and blocks on a terminal, blocks in a pipe, letters where blocks cannot be
written.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from stratocache.api import terminal
from stratocache.api.sizes import format_size

if TYPE_CHECKING:
    from stratocache.api.client import Document

CELLS = 60
"""Of a plot, at most."""
_PERIOD_S = 10
_LEVELS, _LEVELS_PLAIN = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_SHADES, _SHADES_PLAIN = "·░▒▓█", ".-+*#"
_SIGNS = {
    "images": "█#", "disks": "▓=", "stage": "▒+", "quarantine": "!!", "other": "░-",
    "reserve": "::", "free": "·.",
}  # fmt: skip
"""With blocks and without."""
_NAME_WIDTH = 15


def sparkline(values: Sequence[float], *, blocks: bool = True) -> str:
    """Return a line of one sign for each value, as high as it is beside the greatest."""
    levels = _LEVELS if blocks else _LEVELS_PLAIN
    top = max(values, default=0)
    if top <= 0:
        return levels[0] * len(values)
    return "".join(
        levels[0 if value <= 0 else max(1, round(value / top * (len(levels) - 1)))]
        for value in values
    )


def bar_map(shares: Sequence[float], *, blocks: bool = True) -> str:
    """Return a bar with one sign for each part: full only where all of it is here."""
    shades = _SHADES if blocks else _SHADES_PLAIN
    last = len(shades) - 1
    return "".join(
        shades[
            last if share >= 1 else 0 if share <= 0 else 1 + min(last - 2, int(share * (last - 1)))
        ]
        for share in shares
    )


def stacked_line(parts: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return a bar of parts side by side: the signs of each, with its kind.

    Parts are given by kind and size; whatever there is of one is seen.
    """
    whole = sum(size for _kind, size in parts)
    shown = [(kind, size) for kind, size in parts if size > 0]
    spare = CELLS - len(shown)
    ends, below = [], 0
    for _kind, size in shown:
        below += size
        ends.append(spare * below // whole)
    widths = [1 + end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return [(sign_of(kind) * width, kind) for (kind, _), width in zip(shown, widths, strict=True)]


def sign_of(kind: str) -> str:
    """Return the sign of a kind of space in a bar: each has its own, for who sees no colours."""
    return _SIGNS[kind][0 if _blocks() else 1]


def periods(history: "Sequence[Document]", field: str) -> list[float]:
    """Return a history's values for each ten seconds up to its end, those without any too."""
    if not history:
        return []
    at = [int(datetime.fromisoformat(sample["at"]).timestamp()) // _PERIOD_S for sample in history]
    first = max(at[0], at[-1] - CELLS + 1)
    values = [0.0] * (at[-1] - first + 1)
    for period, sample in zip(at, history, strict=True):
        if period >= first:
            values[period - first] += sample[field]
    return values


def echo_here(document: "Document") -> None:
    """Write which part of an image is here, and when the rest will be."""
    shares = document["local_map"]
    if not shares or document["size_bytes"] is None or document["local_bytes"] is None:
        return
    size_bytes, here_bytes = document["size_bytes"], document["local_bytes"]
    percent = 100 * here_bytes // size_bytes if size_bytes else 100
    words = f"{percent} % of {format_size(size_bytes)}"
    if document["complete_in_s"]:
        words += f", complete in {duration(document['complete_in_s'])}"
    _echo("here", bar_map(shares, blocks=_blocks()), "green", words)


def echo_history(document: "Document") -> None:
    """Write how long guests waited for remote bytes, and what was moved, over time."""
    history = document["traffic_history"]
    if not history:
        return
    waits, moved = periods(history, "remote_wait_s"), periods(history, "remote_bytes")
    span = f"last {duration(len(waits) * _PERIOD_S)} with traffic"
    wait = f"{duration(document['remote_wait_s'])} in all, {span}"
    _echo("guests waited", sparkline(waits, blocks=_blocks()), "yellow", wait)
    words = f"{format_size(document['remote_bytes'])} in all"
    _echo("moved", sparkline(moved, blocks=_blocks()), "cyan", words)


def ratio_line(document: "Document") -> str:
    """Return hits and misses as a sentence."""
    ratio = document["hit_ratio"]
    if ratio is None:
        return "nothing has been read yet"
    return f"{100 * ratio:.1f} % of {document['hits'] + document['misses']} reads found it here"


def duration(seconds: float) -> str:
    """Return a time for people: 0.25 s, 12 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 10:
        return f"{seconds:.3g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _blocks() -> bool:
    """Tell whether standard output can have more than ASCII."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def _echo(name: str, plot: str, colour: str, words: str) -> None:
    head = f"{name + ':':<{_NAME_WIDTH}}"
    if not terminal.is_terminal():
        click.echo(f"{head}{plot}  {words}")
        return
    from rich.text import Text

    line = Text(head)
    line.append(plot, style=colour)
    line.append(f"  {words}")
    terminal.console().print(line, soft_wrap=True)
