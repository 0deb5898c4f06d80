"""What the shell completes: ids and names, by asking the daemon, which has a moment to answer.

A completion never fails and never writes anything but completions: what cannot be found out in time
is not offered.
"""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click

from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, plain
from stratocache.cache.errors import StratocacheError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from stratocache.api.client import Document

_ANSWER_S = 0.3
"""How long the daemon may take: longer is a shell that hangs."""
_PAGE_LENGTH = 1000
_HELP_CHARACTERS = 60
_SAFE = re.compile(r"[A-Za-z0-9._@:+/-]+")
"""Shells expand or split at anything else."""
_FAILURES = (StratocacheError, OSError, LookupError, TypeError, ValueError)

Found = Sequence[tuple[str, str]]
"""Values, each with what it is in a few words."""


class Known(click.ParamType[str]):
    """Text that names something which exists: the shell offers what does."""

    name = "text"

    def __init__(self, find: Callable[[Session, dict[str, Any]], Found]) -> None:
        self._find = find

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is: the daemon says whether it exists. An empty one, as of a shell's
        variable that is not set, would be taken for all there is."""
        if not value:
            self.fail("It is empty.", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        """Return what begins like that; nothing when it cannot be found out in time."""
        from click.shell_completion import CompletionItem

        session = ctx.find_object(Session) or Session()
        session.choose(**ctx.find_root().params)
        return [
            CompletionItem(value, help=plain(words)[:_HELP_CHARACTERS] or None)
            for value, words in _in_time(session, lambda: self._find(session, _parameters(ctx)))
            if value.startswith(incomplete) and _SAFE.fullmatch(value)
        ]


def _parameters(context: click.Context) -> dict[str, Any]:
    """Return what was given so far; behind an option without its value click has no arguments."""
    given = {name: value for name, value in context.params.items() if value is not None}
    return {"uuid": next(iter(context.args), None), **given}


def _in_time(session: Session, find: Callable[[], Found]) -> Found:
    """Return what is found, or nothing: a name server or a daemon may hang, anything may fail."""
    found: list[Found] = []

    def ask() -> None:
        with suppress(*_FAILURES):  # there is nobody to tell: the terminal shows half a command
            found.append(find())

    with suppress(*_FAILURES):
        _ = session.client  # made here, as the time is the daemon's
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return found[0] if found else ()


def _items(session: Session, path: str, name: str) -> "list[Document]":
    items: list[Document] = session.client.get(path, limit=_PAGE_LENGTH)[name]
    return items


def _of_disk(parameters: dict[str, Any], name: str) -> str:
    return path_of("disks", parameters.get("uuid") or "-", name)


def _disks(session: Session, _parameters: dict[str, Any]) -> Found:
    disks = _items(session, "/v1/disks", "disks")
    return [(item["uuid"], f"{item['tag']} {item['state']}".strip()) for item in disks]


def _images(session: Session, _parameters: dict[str, Any]) -> Found:
    images = _items(session, "/v1/images", "images")
    return [(item["id"], item["entry"]["title"] or item["state"]) for item in images]


def _snapshots(session: Session, parameters: dict[str, Any]) -> Found:
    snapshots = _items(session, _of_disk(parameters, "snapshots"), "snapshots")
    return [(item["id"], f"{item['tag']} {item['created_at']}".strip()) for item in snapshots]


def _holders(session: Session, parameters: dict[str, Any]) -> Found:
    attachments = _items(session, _of_disk(parameters, "attachments"), "attachments")
    return [(item["instance"], item["access"]) for item in attachments]


def _instances(session: Session, _parameters: dict[str, Any]) -> Found:
    launches = _items(session, "/v1/launches", "launches")
    return [(item["instance"], item["reference"]) for item in launches]


def _operations(session: Session, _parameters: dict[str, Any]) -> Found:
    operations = _items(session, "/v1/operations", "operations")
    return [(item["id"], f"{item['kind']} {item['state']}") for item in operations]


def _remotes(_session: Session, _parameters: dict[str, Any]) -> Found:
    from stratocache.api import remotes

    known = remotes.read().remotes.values()
    return [(remotes.LOCAL, "this host"), *((remote.name, remote.url) for remote in known)]


def _accounts(session: Session, _parameters: dict[str, Any]) -> Found:
    return [(item["name"], item["role"]) for item in _items(session, "/v1/accounts", "accounts")]


def _tokens(session: Session, parameters: dict[str, Any]) -> Found:
    path = path_of("accounts", parameters.get("name") or "-", "tokens")
    tokens = _items(session, path, "tokens")
    return [(item["id"], item["description"]) for item in tokens]


ACCOUNT: Final = Known(_accounts)
DISK: Final = Known(_disks)
HOLDER: Final = Known(_holders)
"""An instance that has the disk of the same command."""
IMAGE: Final = Known(_images)
INSTANCE: Final = Known(_instances)
OPERATION: Final = Known(_operations)
REMOTE: Final = Known(_remotes)
SNAPSHOT: Final = Known(_snapshots)
"""Of the disk of the same command."""
TOKEN: Final = Known(_tokens)
"""Of the account of the same command."""
