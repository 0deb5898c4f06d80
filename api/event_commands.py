"""`stratocache event`: what happened, and what happens."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from stratocache.api.examples import examples
from stratocache.api.session import Command, Session, json_option, plain

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from stratocache.api.client import Document

_STREAM = "text/event-stream"
_PAUSE_S = 1.0
_SILENCE_S = 60.0
"""A stream that says nothing for so long has been cut: it says that it is there every 15 s."""
_COLUMNS = ("number", "at", "kind", "subject", "message")
_SHOWN_MAX = 20


def _filters(command: Command) -> Command:
    for option in (
        click.option("--subject", metavar="ID", help="Of this image, disk, instance, …."),
        click.option("--kind", help="Kinds that begin so, such as disk. or fetch.failed."),
    ):
        command = option(command)
    return command


@click.group()
def event() -> None:
    """List what happened, and follow what happens: yours, or all for operators."""


@event.command(
    epilog=examples(
        "stratocache event ls --kind disk.",
        "stratocache event ls --all --json",
        "stratocache event ls --follow --subject $UUID",
    )
)
@_filters
@click.option("--all", "everything", is_flag=True, help=f"Not only the last {_SHOWN_MAX}.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@json_option
@click.pass_obj
def ls(
    session: Session, subject: str | None, kind: str | None, everything: bool, follow: bool
) -> None:
    """List the events, oldest first."""
    chosen = _chosen(kind, subject)
    events = _all(session, chosen) if everything else _last(session, chosen, _SHOWN_MAX)
    if follow:
        for item in events:
            _write(session, item)
        _follow(session, chosen, events[-1]["number"] if events else None)
        return
    columns = {name.upper(): name for name in _COLUMNS}
    session.show_table("events", events, columns)


@event.command(
    epilog=examples("stratocache event follow", "stratocache event follow --kind fetch. --json")
)
@_filters
@click.option("--after", type=click.IntRange(min=0), help="Begin behind the event of this number.")
@json_option
@click.pass_obj
def follow(session: Session, subject: str | None, kind: str | None, after: int | None) -> None:
    """Write events as they happen, one a line, until Ctrl-C; none is missed meanwhile."""
    _follow(session, _chosen(kind, subject), after)


def _chosen(kind: str | None, subject: str | None) -> dict[str, str]:
    given = {"kind": kind, "subject": subject}
    return {name: value for name, value in given.items() if value is not None}


def _last(session: Session, chosen: dict[str, str], length: int) -> "list[Document]":
    page = session.client.get("/v1/events", sort="-number", limit=length, **chosen)
    found: list[Document] = page["events"]
    return found[::-1]


def _all(session: Session, chosen: dict[str, str]) -> "list[Document]":
    return session.client.items("/v1/events", "events", **chosen)


def _write(session: Session, item: "Document") -> None:
    """Write one event on one line, at once."""
    if session.as_json:
        text = json.dumps(item)
    else:
        text = f"{item['at']}  {item['kind']}  {plain(item['subject'])}  {plain(item['message'])}"
    click.echo(text)


def _follow(session: Session, chosen: dict[str, str], number: int | None) -> None:
    """Write events until Ctrl-C; a daemon that goes away is asked again, for what was missed."""
    latest = _last(session, {}, 1)  # also tells whether there is a daemon
    if number is None:
        number = latest[0]["number"] if latest else 0
    with suppress(KeyboardInterrupt):
        while True:
            for item in _stream(session, chosen, number):
                number = item["number"]
                _write(session, item)
            time.sleep(_PAUSE_S)


def _stream(session: Session, chosen: dict[str, str], number: int) -> "Iterator[Document]":
    """Yield the events behind a number until the stream ends."""
    from urllib.parse import urlencode

    from stratocache.cache.errors import Unreachable

    headers = {"Accept": _STREAM, "Last-Event-ID": str(number)}
    query = f"?{urlencode(chosen)}" if chosen else ""
    address = f"/v1/events{query}"
    try:
        with session.client.exchange("GET", address, headers, timeout_s=_SILENCE_S) as response:
            yield from _messages(response)
    except Unreachable as error:
        if error.code != "daemon-unreachable":
            raise


def _messages(response: "HTTPResponse") -> "Iterator[Document]":
    """Yield the data of each message (HTML standard, 9.2); a cut stream ends."""
    from http.client import HTTPException

    data: list[bytes] = []
    try:
        for line in response:
            line = line.rstrip(b"\r\n")
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                yield json.loads(b"\n".join(data))
                data = []
    except (OSError, HTTPException):
        return
