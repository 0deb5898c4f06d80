"""`stratocache cache`: where the space has gone, and what holds it."""

from typing import TYPE_CHECKING, Any

import click

from stratocache.api.session import Session, json_option, plain
from stratocache.api.sizes import format_size

if TYPE_CHECKING:
    from stratocache.api.client import Document

_LINES = (
    ("chunks of images", "chunk_bytes"),
    ("manifests", "manifest_bytes"),
    ("disks and snapshots", "disk_allocated_bytes"),
    ("stage", "stage_bytes"),
    ("quarantine", "quarantine_bytes"),
    ("free", "free_bytes"),
    ("of it reserved", "reserve_bytes"),
    ("of it available", "available_bytes"),
    ("promised to disks", "promised_bytes"),
    ("may be promised", "promise_limit_bytes"),
)


@click.group()
def cache() -> None:
    """Show what the cache and the disks take, and what holds it."""


@cache.command()
@json_option
@click.pass_obj
def status(session: Session) -> None:
    """Show the bytes by kind, what is promised and what is there."""
    account = session.client.get("/v1/cache")
    session.show(account, space_lines(account))


@cache.command()
@json_option
@click.pass_obj
def plan(session: Session) -> None:
    """Show the space, and each image with what keeps it, the longest unused first."""
    document = session.client.get("/v1/cache/plan")
    if session.as_json:
        session.show(document, "")
        return
    click.echo(space_lines(document["space"]) + "\n")
    session.show_table(
        "images",
        document["images"],
        {
            "IMAGE": lambda item: item["image"],
            "SIZE": lambda item: _size(item["size_bytes"]),
            "LAST USED": lambda item: item["last_used_at"],
            "KEPT BY": _holders,
            "TITLE": lambda item: item["title"] or None,
        },
    )


def space_lines(account: "Document") -> str:
    """Return an account of space for people, one kind a line."""
    return "\n".join(f"{name + ':':<21}{_size(account[key])}" for name, key in _LINES)


def promise_line(account: "Document") -> str:
    """Return one sentence on what is promised and what is there, for `disk create`."""
    return (
        f"Disks are promised {format_size(account['promised_bytes'])} more than they have; "
        f"{format_size(account['available_bytes'])} are available."
    )


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _holders(item: "Document") -> str | None:
    named: list[tuple[str, Any]] = [
        ("pin", item["pinned"]),
        (f"{item['disk_count']} disks", item["disk_count"]),
        (f"{item['instance_count']} instances", item["instance_count"]),
    ]
    return ", ".join(plain(name) for name, true in named if true) or None
