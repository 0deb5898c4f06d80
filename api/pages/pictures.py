"""The pictures: where space went, what came over time, which parts of an image are here."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from stratocache.api.pages.drawing import element, picture, share, stretched
from stratocache.api.pages.formats import percent, size

_BAR_PX = 22
_STRIP_PX = 26
_BOOT_PX = 6
_SLIVER = 0.004
"""The least share of a bar at which a part is drawn: what is there is seen."""
_SHADES = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a bar."""

    name: str
    size_bytes: int
    kind: str
    """Its class in the stylesheet: what it means, which gives its colour."""


def stacked_bar(name: str, segments: Sequence[Segment], whole_bytes: int | None = None) -> Markup:
    """Return a bar of segments side by side; `whole_bytes` is its end, their sum unless given."""
    whole = max(whole_bytes or 0, sum(segment.size_bytes for segment in segments))
    shown = [segment for segment in segments if segment.size_bytes > 0]
    widths = [max(_SLIVER, segment.size_bytes / whole) for segment in shown] if whole else []
    scale = max(1.0, sum(widths))
    shapes, start = [], 0.0
    for segment, width in zip(shown, widths, strict=True):
        words = f"{segment.name}: {size(segment.size_bytes)}"
        title = element("title", escape(words))
        shapes.append(element(
            "rect", title, x=share(start, scale), width=share(width, scale), y=0, height=_BAR_PX,
            class_=f"seg {segment.kind}",
        ))  # fmt: skip
        start += width
    return picture(name, shapes, height=_BAR_PX, class_="bar")


def span_bar(name: str, start: float, parts: Sequence[tuple[float, str]]) -> Markup:
    """Return a thin bar that begins at a share of the width; parts are shares with their class."""
    shapes = [element("rect", x=0, width="100%", y=3, height=10, class_="seg free")]
    x = start
    for width, kind in parts:
        shapes.append(element("rect", x=share(x, 1), width=share(width, 1), y=3, height=10,
                              class_=f"seg {kind}"))  # fmt: skip
        x += width
    return picture(name, shapes, height=16, class_="bar thin")


def meter(name: str, part: float, whole: float, kind: str = "accent") -> Markup:
    """Return how much of a whole there is."""
    filled = min(1.0, part / whole) if whole else 0.0
    return span_bar(name, 0.0, [(filled, kind)])


def sparkline(name: str, values: Sequence[float]) -> Markup:
    """Return an area of values over time, the latest at the right."""
    top = max(values, default=0.0)
    if len(values) < 2 or top <= 0:
        values, top = [0.0, 0.0], 1.0
    last = len(values) - 1
    line = " ".join(f"{index},{97 - 92 * value / top:.1f}" for index, value in enumerate(values))
    shapes = [
        element("polygon", points=f"0,97 {line} {last},97", class_="area"),
        element("polyline", points=line, class_="line", vector_effect="non-scaling-stroke"),
    ]
    return stretched(name, shapes, units=last, class_="spark")


def map_strip(shares: Sequence[float], boot: Sequence[float] = ()) -> Markup:
    """Return which of so many equal parts of an image are here, and below it where its boot reads.

    Both are the shares of the chunks of each part, from 0 to 1.
    """
    here = sum(shares) / len(shares) if shares else 0.0
    name = f"{percent(here)} of the image is here"
    if boot:
        name += f"; its boot reads {percent(sum(boot) / len(boot), 1)} of it"
    shapes = _cells(shares, 0, _STRIP_PX, "here")
    shapes += _cells(boot, _STRIP_PX + 4, _BOOT_PX, "boot")
    height = _STRIP_PX + (4 + _BOOT_PX if boot else 0)
    return picture(name, shapes, height=height, class_="strip")


def _cells(shares: Sequence[float], y: int, height: int, kind: str) -> list[Markup]:
    """Return neighbours that look the same as one rectangle."""
    runs: list[tuple[int, int, int]] = []
    for index, value in enumerate(shares):
        shade = 0 if value <= 0 else max(1, int(value * _SHADES))
        if runs and runs[-1][2] == shade:
            runs[-1] = (runs[-1][0], index + 1, shade)
        else:
            runs.append((index, index + 1, shade))
    return [
        element("rect", x=share(first, len(shares)), width=share(end - first, len(shares)), y=y,
                height=height, class_=f"{kind} s{shade}")
        for first, end, shade in runs
    ]  # fmt: skip
