"""The pictures of how things follow each other: a disk's snapshots, and what was made of an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup, escape

from stratocache.api.image_views import LineageDisk
from stratocache.api.pages.drawing import drawing, element, share
from stratocache.api.pages.formats import count, exact_time, short
from stratocache.api.representations import SnapshotView

_TIMELINE_PX = 64
_LINE_Y = 24
_MARGIN, _GAP = 0.05, 0.045
_LABELS_MAX = 8
_LABEL_CHARACTERS = 14
_ROW_PX, _INDENT_PX, _LETTER_PX = 28, 24, 7.6
NODES_MAX = 150
"""Disks and snapshots that a picture of lineage shows."""


def snapshot_timeline(snapshots: Sequence[SnapshotView], created_at: str, now: datetime) -> Markup:
    """Return a disk's snapshots on a line from its creation until now; each is a link."""
    begin = datetime.fromisoformat(created_at)
    whole_s = max(1.0, (now - begin).total_seconds())
    wanted = [
        (datetime.fromisoformat(item.created_at) - begin).total_seconds() / whole_s
        for item in snapshots
    ]
    places = [_MARGIN + (1 - 2 * _MARGIN) * place for place in _spread(wanted)]
    shapes = [
        element("line", x1="2%", x2="98%", y1=_LINE_Y, y2=_LINE_Y, class_="axis"),
        element("rect", element("title", escape(f"created {exact_time(created_at)}")),
                x="2%", y=_LINE_Y - 5, width=4, height=10, class_="born"),
        element("text", "now", x="98%", y=_LINE_Y + 28, class_="label end"),
    ]  # fmt: skip
    for item, place in zip(snapshots, places, strict=True):
        shapes.append(_point(item, place, labelled=len(snapshots) <= _LABELS_MAX))
    name = f"{count(len(snapshots), 'snapshot')} since the disk was created, oldest first"
    return element(
        "svg", *shapes, role="group", aria_label=name, class_="timeline", width="100%",
        height=_TIMELINE_PX,
    )  # fmt: skip


def _point(item: SnapshotView, place: float, *, labelled: bool) -> Markup:
    name = item.tag or short(item.id)
    words = f"{name}, {exact_time(item.created_at)}, {item.state}"
    at = share(place, 1)
    ready = "ready" if item.state == "available" else "making"
    content = [
        element("title", escape(words)),
        element("circle", cx=at, cy=_LINE_Y, r=7, class_=f"point {ready}"),
    ]
    if labelled:
        content.append(element("text", escape(_cut(name)), x=at, y=_LINE_Y + 28, class_="label"))
    return element("a", *content, href=f"#snapshot-{item.id}", aria_label=words)


def _spread(places: Sequence[float]) -> list[float]:
    """Return places, in order from 0 to 1, moved apart so that each can be hit."""
    gap = min(_GAP, 1 / len(places)) if places else 0.0
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    bound = 1 - gap  # "now" is beyond the last
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = max(0.0, min(moved[index], bound))
        bound = moved[index] - gap
    return moved


@dataclass(frozen=True, slots=True)
class _Node:
    depth: int
    kind: str
    words: str
    address: str
    detail: str


def lineage_tree(title: str, disks: Sequence[LineageDisk]) -> Markup:
    """Return the disks of an image, their snapshots and the clones of these, as a tree of links."""
    nodes = [_Node(0, "image", title, "", "")]
    for node in _nodes(disks, 1):
        if len(nodes) > NODES_MAX:
            break
        nodes.append(node)
    latest: dict[int, int] = {}
    shapes = []
    for row, node in enumerate(nodes):
        x, y = 12 + node.depth * _INDENT_PX, row * _ROW_PX + _ROW_PX // 2
        if node.depth:
            above = latest[node.depth - 1] * _ROW_PX + _ROW_PX // 2 + 6
            path = f"M{x - _INDENT_PX},{above} V{y} H{x - 7}"
            shapes.append(element("path", d=path, class_="branch"))
        latest[node.depth] = row
        shapes.append(_node(node, x, y))
    longest = max(
        12 + node.depth * _INDENT_PX + 16 + _LETTER_PX * (len(node.words) + len(node.detail) + 2)
        for node in nodes
    )
    name = f"What was made of {title}"
    return drawing(name, shapes, width=int(longest), height=len(nodes) * _ROW_PX, class_="tree")


def _nodes(disks: Sequence[LineageDisk], depth: int) -> Iterator[_Node]:
    for disk in disks:
        held = f"attached to {', '.join(disk.attached_to)}" if disk.attached_to else "free"
        form = disk.form or disk.state
        yield _Node(depth, "disk", disk.tag or short(disk.uuid), f"/disks/{disk.uuid}",
                    f"{form}, {held}")  # fmt: skip
        for snapshot in disk.snapshots:
            yield _Node(depth + 1, "snapshot", snapshot.tag or short(snapshot.id),
                        f"/disks/{disk.uuid}#snapshot-{snapshot.id}", "snapshot")  # fmt: skip
            yield from _nodes(snapshot.disks, depth + 2)


def _node(node: _Node, x: int, y: int) -> Markup:
    if node.kind == "snapshot":
        mark = element("circle", cx=x, cy=y, r=4, class_="mark snapshot")
    else:
        mark = element("rect", x=x - 5, y=y - 5, width=10, height=10, rx=2,
                       class_=f"mark {node.kind}")  # fmt: skip
    detail = element("tspan", escape(f"  {node.detail}"), class_="detail") if node.detail else ""
    text = element("text", escape(node.words), detail, x=x + 14, y=y + 4)
    if not node.address:
        return element("g", mark, text)
    return element("a", mark, text, href=node.address)


def _cut(name: str) -> str:
    return name if len(name) <= _LABEL_CHARACTERS else f"{name[: _LABEL_CHARACTERS - 1]}…"
