"""`stratocache overview`: how things are, on one page of the terminal."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from stratocache.api import terminal
from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option, plain
from stratocache.api.sizes import format_size
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document

_EVENTS_MAX = 8
_NAME_WIDTH = 13
_COUNTED = ("images", "disks", "snapshots", "attachments", "launches")
_COLOURS = {
    "images": "green", "disks": "blue", "stage": "yellow", "quarantine": "red", "other": "magenta",
    "reserve": "cyan", "free": "dim", "problem": "bold red",
}  # fmt: skip

Span = tuple[str, str]
"""Text, and what it stands for, which gives its colour."""
Line = list[Span]


@click.command(
    epilog=examples(
        "stratocache overview",
        "stratocache overview --watch --interval 10",
        "stratocache --remote node3 overview --json | jq .problems",
    )
)
@watch_option
@json_option
@click.pass_obj
def overview(session: Session) -> None:
    """Show what takes the space, what there is, what is under way, what is wrong, what happened.

    Of what one may see. `status` is another name for it.
    """
    document = session.client.get("/v1/overview")
    if session.as_json:
        session.show(document, "")
    elif terminal.is_terminal():
        _draw(document)
    else:
        _write(document)


def _sections(document: "Document") -> Iterator[tuple[str, list[Line]]]:
    """Yield what there is to be said, by name, the most urgent first."""
    yield "problems", [_problem(item) for item in document["problems"]]
    yield from _space(document["space"])
    for name in _COUNTED:
        yield name, [[(_count(document["counts"][name]), "")]]
    yield from _cache(document["cache"])
    yield "under way", [_operation(item) for item in document["operations"]]
    yield "events", [_event(item) for item in document["events"][:_EVENTS_MAX]]


def _problem(item: "Document") -> Line:
    name = f"{item['kind']} {plain(item['subject'])}"
    return [(name, "problem"), (f": {plain(item['message'])}", "")]


def _space(space: "Document") -> Iterator[tuple[str, list[Line]]]:
    from stratocache.api import plots
    from stratocache.api.space_parts import space_parts

    total_bytes = space["total_bytes"]
    free_share = space["free_bytes"] / total_bytes if total_bytes else 0
    parts = space_parts(space)
    bar: Line = list(plots.stacked_line([(kind, size) for _name, size, kind in parts]))
    yield "space", [[*bar, (f"  {format_size(total_bytes)}, {100 * free_share:.0f} % free", "")]]
    legend: Line = []
    for name, size_bytes, kind in parts:
        gap = ", " if legend else ""
        legend += [
            (gap, ""),
            (plots.sign_of(kind), kind),
            (f" {name} {format_size(size_bytes)}", ""),
        ]
    yield "of it", [legend]
    promised, limit = (
        format_size(space["promised_bytes"]),
        format_size(space["promise_limit_bytes"]),
    )
    yield "promised", [[(f"{promised} of {limit} that may be", "")]]


def _cache(cache: "Document") -> Iterator[tuple[str, list[Line]]]:
    from stratocache.api import plots

    yield "reads", [[(plots.ratio_line(cache), "")]]
    saved, shared = format_size(cache["cache_saved_bytes"]), format_size(cache["shared_bytes"])
    fetched = format_size(cache["remote_bytes"])
    yield "saved", [[(f"{saved} by the cache, {shared} by sharing; {fetched} fetched", "")]]


def _count(states: Mapping[str, int]) -> str:
    """Return how many there are: `5 (4 available, 1 creating)`."""
    each = ", ".join(f"{number} {plain(state)}" for state, number in sorted(states.items()))
    return f"{sum(states.values())} ({each})" if each else "0"


def _operation(item: "Document") -> Line:
    from stratocache.api import plots
    from stratocache.api.progress import progress_text

    words = item["state"]
    if item["progress_bytes"] or item["total_bytes"]:
        words = progress_text(item["progress_bytes"], item["total_bytes"])
    if item["complete_in_s"]:
        words += f", done in {plots.duration(item['complete_in_s'])}"
    return [(f"{item['kind']} {plain(item['subject'])} ({item['id']}): {words}", "")]


def _event(item: "Document") -> Line:
    at = item["at"][:19].replace("T", " ")
    return [(f"{at} {item['kind']} {plain(item['subject'])}: {plain(item['message'])}", "")]


def _draw(document: "Document") -> None:
    """Draw it on a terminal, where long lines go on below their beginning."""
    from rich.table import Table
    from rich.text import Text

    page = Table.grid(padding=(0, 2))
    page.add_column(no_wrap=True, style="dim" if terminal.has_colours() else "")
    page.add_column(overflow="fold")
    for name, lines in _sections(document):
        if not lines and name == "problems":
            continue
        for line in lines or [[("-", "")]]:
            text = Text()
            for words, kind in line:
                text.append(words, style=_COLOURS.get(kind, ""))
            page.add_row(name, text)
            name = ""
    terminal.console().print(page)


def _write(document: "Document") -> None:
    """Write it as lines, each with a name of its own before the colon."""
    for name, lines in _sections(document):
        head = f"{name + ':':<{_NAME_WIDTH}}"
        texts = ["".join(words for words, _kind in line) for line in lines]
        if name in ("problems", "under way", "events"):
            click.echo(f"{head}{len(texts)}")
            for text in texts:
                click.echo(f"  {text}")
        else:
            click.echo(head + texts[0])
