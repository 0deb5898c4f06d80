"""What was made of an image, as a tree for people."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click

from stratocache.api import terminal
from stratocache.api.session import plain

if TYPE_CHECKING:
    from stratocache.api.client import Document

_LINES_MAX = 200
"""Disks and snapshots that people are shown; the JSON has more."""


def show_lineage(document: "Document") -> None:
    """Write what was made of an image: a tree on a terminal, elsewhere lines that are indented."""
    lines = list(islice(_disks(document["disks"], 1), _LINES_MAX))
    omitted = document["disk_count"] + document["snapshot_count"] - len(lines)
    if omitted:
        lines.append((1, f"and {omitted} more disks and snapshots: --json, disk ls"))
    if terminal.is_terminal():
        _show_rich(document["id"], lines)
        return
    for depth, text in lines:
        click.echo("  " * depth + text)


def _disks(disks: "list[Document]", depth: int) -> Iterator[tuple[int, str]]:
    for disk in disks:
        attached = ", ".join(map(plain, disk["attached_to"]))
        facts = [disk["form"] or disk["state"], f"attached to {attached}" if attached else "free"]
        yield depth, f"disk {disk['uuid']}{_tag(disk)}: {', '.join(facts)}"
        for snapshot in disk["snapshots"]:
            text = f"snapshot {snapshot['id']}{_tag(snapshot)}: of {snapshot['created_at']}"
            yield depth + 1, text
            yield from _disks(snapshot["disks"], depth + 2)


def _tag(item: "Document") -> str:
    return f" ({plain(item['tag'])})" if item["tag"] else ""


def _show_rich(title: str, lines: list[tuple[int, str]]) -> None:
    from rich.text import Text
    from rich.tree import Tree

    path = [Tree(Text(f"image {title}"))]
    for depth, text in lines:
        del path[depth:]
        path.append(path[-1].add(Text(text)))
    terminal.console().print(path[0])
