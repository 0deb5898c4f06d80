"""Formats and pictures of the pages: nothing is shown as more than it is."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from support.api_daemon import entry

from stratocache.api.image_views import LineageDisk, LineageSnapshot
from stratocache.api.pages import formats
from stratocache.api.pages.cache import plan_bars, plan_segments
from stratocache.api.pages.pictures import Segment, map_strip, sparkline, stacked_bar
from stratocache.api.pages.timelines import lineage_tree, snapshot_timeline
from stratocache.api.representations import SnapshotView
from stratocache.api.sizes import parse_size
from stratocache.cache.footprint import Footprint
from stratocache.fs.keep_plan import Candidate
from stratocache.fs.records import Image, ImageId
from stratocache.fs.space_plan import ImageHolding

NOW = datetime(2026, 11, 22, 8, tzinfo=UTC)
SIZES = st.integers(min_value=0, max_value=2**50)


def _shapes(picture: Markup, name: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(picture)
    return [dict(found.attrib) for found in root.iter() if found.tag.endswith(name)]


def _share(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


@pytest.mark.parametrize(
    ("ratio", "digits", "shown"),
    [(None, 0, "—"), (1.0, 0, "100 %"), (0.9999, 0, "99 %"), (0.99999, 1, "99.9 %"), (0, 0, "0 %")],
)
def test_what_is_not_all_is_not_shown_as_all(ratio: float | None, digits: int, shown: str) -> None:
    """100 % means all of it."""
    assert formats.percent(ratio, digits) == shown


@pytest.mark.parametrize(
    ("age_s", "shown"),
    [(0, "now"), (45, "45 s ago"), (3599, "59 min ago"), (7200, "2 h ago"), (-90, "in 1 min"),
     (86400 * 3, "3 d ago"), (86400 * 40, "2026-10-13")],
)  # fmt: skip
def test_times_are_relative_while_that_says_more(age_s: int, shown: str) -> None:
    """A time within a month is how long ago; an earlier one is a date."""
    at = (NOW - timedelta(seconds=age_s)).isoformat()

    assert formats.relative_time(at, NOW) == shown
    assert formats.exact_time(NOW.isoformat()) == "2026-11-22 08:00:00 UTC"


@given(SIZES)
def test_size_in_a_form_means_what_it_was(size_bytes: int) -> None:
    """What a field is filled in with is exactly the value that it stands for."""
    assert parse_size(formats.typed_size(size_bytes)) == size_bytes


@given(st.lists(SIZES, max_size=8), SIZES)
def test_bar_is_filled_by_its_segments(sizes: list[int], whole: int) -> None:
    """Segments of a bar touch, never overlap, and never leave the bar; what is there is seen."""
    segments = [Segment(f"<{index}>", size, "images") for index, size in enumerate(sizes)]
    shapes = _shapes(stacked_bar("space & more", segments, whole), "rect")

    assert len(shapes) == sum(size > 0 for size in sizes)
    end = 0.0
    for shape in shapes:
        assert abs(_share(shape["x"]) - end) < 0.01
        assert _share(shape["width"]) > 0
        end = _share(shape["x"]) + _share(shape["width"])
    assert end <= 100.01


@given(st.lists(st.floats(min_value=0, max_value=1e12), max_size=50))
def test_sparkline_stays_within_its_frame(values: list[float]) -> None:
    """Every point of a line is within the picture, whatever the values."""
    (line,) = _shapes(sparkline("traffic", values), "polyline")
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]

    assert len(points) >= 2
    assert all(0 <= y <= 100 for _x, y in points)


@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=128))
def test_strip_covers_the_image(shares: list[float]) -> None:
    """The cells of a map are side by side from the image's beginning to its end."""
    cells = _shapes(map_strip(shares), "rect")

    assert abs(sum(_share(cell["width"]) for cell in cells) - 100) < 0.5
    if any(share < 1 for share in shares):
        assert "100 %" not in map_strip(shares)


@given(st.lists(st.integers(min_value=0, max_value=10**6), max_size=30))
def test_snapshots_on_a_timeline_can_be_told_apart(ages_s: list[int]) -> None:
    """Points are in the order of time, within the line, and none hides another."""
    ages_s.sort(reverse=True)
    snapshots = [_snapshot(index, age_s) for index, age_s in enumerate(ages_s)]
    created_at = (NOW - timedelta(seconds=10**6)).isoformat()
    places = [_share(item["cx"])
              for item in _shapes(snapshot_timeline(snapshots, created_at, NOW), "circle")]  # fmt: skip

    assert len(places) == len(ages_s)
    assert all(0 <= place <= 96 for place in places)
    assert all(later - earlier > 1 for earlier, later in pairwise(places))


def test_lineage_has_a_line_for_each_and_hides_nothing_hostile() -> None:
    """A tree names disks and snapshots as links, with their tags as text."""
    clone = _disk("clone", [])
    disk = _disk("<b>tag</b>", [LineageSnapshot(
        id="2" * 36, state="available", tag="", created_at=NOW.isoformat(), disks=[clone]
    )])  # fmt: skip
    picture = lineage_tree("an <image>", [disk])

    assert len(_shapes(picture, "text")) == 4
    assert len(_shapes(picture, "a")) == 3
    assert len(_shapes(picture, "path")) == 3
    assert "<b>" not in picture


def test_plan_of_eviction_is_a_stair() -> None:
    """Each image that may go begins where the one before it ended; what stays has no step."""
    plan = [_candidate("a" * 27, 1, 30, boot=10), _candidate("b" * 27, 2, 80),
            _candidate("c" * 27, None, 0)]  # fmt: skip
    bars = [_shapes(bar, "rect")[1:] for bar in plan_bars(plan, {"a" * 27})]
    segments = plan_segments(plan, {"a" * 27}, 500)

    assert [[(shape["x"], shape["width"]) for shape in bar] for bar in bars] == [
        [("0.000%", "20.000%")], [("20.000%", "80.000%")], [],
    ]  # fmt: skip
    assert ["going" in bar[0]["class"] for bar in bars[:2]] == [True, False]
    assert [segment.size_bytes for segment in segments] == [20, 80, 10, 390]


def _candidate(name: str, order: int | None, freed_bytes: int, boot: int = 0) -> Candidate:
    image = Image(
        number=1, id=ImageId(name), state="verified", size_bytes=1, sha256=None, entry=entry(name),
        pinned=False, created_at=NOW.isoformat(), verified_at=None, last_used_at=None,
    )  # fmt: skip
    footprint = Footprint(freed_bytes, freed_bytes, freed_bytes)
    return Candidate(
        ImageHolding(image, (), ()), None if order else "pinned", footprint, order, boot
    )


def _snapshot(number: int, age_s: int) -> SnapshotView:
    return SnapshotView(
        id=f"{number:036d}", disk_uuid="1" * 36, state="available", size_bytes=1, tag=f"<{number}>",
        owner="root", created_at=(NOW - timedelta(seconds=age_s)).isoformat(), frozen_at=None,
    )  # fmt: skip


def _disk(tag: str, snapshots: list[LineageSnapshot]) -> LineageDisk:
    return LineageDisk(
        uuid="1" * 36, state="available", form="raw", owner="root", tag=tag, attached_to=["vm"],
        snapshots=snapshots,
    )  # fmt: skip
