"""The layout of a disk: what is written is read, anything else is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stratocache.cache.errors import Internal, NotVerified
from stratocache.fs.layers import LAYOUT, RAW, DiskFiles, Layout

LAYOUTS = [
    Layout(10_000, "1", None, None, "image"),
    Layout(0, "7", None, None, None),
    Layout(2**40 + 1, "3", "2", 2**40, "a" * 64),
    Layout(4096, "1", RAW, 4096, None),
]


@pytest.fixture
def files(tmp_path: Path) -> DiskFiles:
    """A disk's empty directory."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "live").mkdir()
    return DiskFiles(tmp_path / "disk", tmp_path / "live" / "disk")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_read_as_it_was_written(files: DiskFiles, layout: Layout) -> None:
    """What is written is read, over any layout before, and no other file stays."""
    files.write_layout(LAYOUTS[0])
    files.write_layout(layout)
    assert files.layout() == layout
    assert [path.name for path in files.directory.iterdir()] == [LAYOUT]


def test_raw_disk_has_no_layout(files: DiskFiles) -> None:
    """Without the file there is no layout, and that is no error."""
    assert files.layout() is None


def test_every_changed_byte_is_found(files: DiskFiles) -> None:
    """No byte of a layout can change unnoticed, but for the space between its fields."""
    files.write_layout(LAYOUTS[2])
    path = files.directory / LAYOUT
    good = path.read_bytes()
    for position, byte in enumerate(good):
        path.write_bytes(good[:position] + bytes([byte ^ 1]) + good[position + 1 :])
        try:
            assert files.layout() == LAYOUTS[2]
            assert bytes([byte]).isspace()
        except (NotVerified, Internal) as error:
            assert error.code in ("overlay-damaged", "overlay-too-new")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 4000, b" " * 5000])
def test_what_is_no_layout_is_damage(files: DiskFiles, content: bytes) -> None:
    """Whatever the file holds, it is refused by its name and left alone."""
    path = files.directory / LAYOUT
    path.write_bytes(content)
    with pytest.raises(NotVerified, match=r"layout\.json") as caught:
        files.layout()
    assert caught.value.code == "overlay-damaged"
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "layout",
    [
        replace(LAYOUTS[0], size_bytes=-1),
        replace(LAYOUTS[0], size_bytes=2**63),
        replace(LAYOUTS[0], top="../../etc"),
        replace(LAYOUTS[0], top="01"),
        replace(LAYOUTS[0], base="../x"),
        replace(LAYOUTS[0], frozen="1", frozen_size_bytes=1),
        replace(LAYOUTS[0], frozen="2", frozen_size_bytes=None),
        replace(LAYOUTS[0], frozen="2", frozen_size_bytes=10_001),
        replace(LAYOUTS[0], frozen_size_bytes=1),
        replace(LAYOUTS[0], frozen="other", frozen_size_bytes=1),
    ],
)
def test_layout_that_makes_no_sense_is_damage(files: DiskFiles, layout: Layout) -> None:
    """Fields of wrong values are refused though their checksum is right."""
    (files.directory / LAYOUT).write_bytes(layout.to_json())
    with pytest.raises(NotVerified) as caught:
        files.layout()
    assert caught.value.code == "overlay-damaged"


def test_layout_of_a_later_version_is_refused(files: DiskFiles) -> None:
    """A later version is too new, whatever fields it has."""
    fields = json.loads(LAYOUTS[0].to_json())
    fields["version"] = 2
    fields["shape"] = "round"
    (files.directory / LAYOUT).write_text(json.dumps(fields))
    with pytest.raises(Internal) as caught:
        files.layout()
    assert caught.value.code == "overlay-too-new"


def test_sweep_keeps_what_the_layout_names(files: DiskFiles) -> None:
    """A sweep removes files of ours without a meaning, and nothing of anybody else."""
    for name in ("1.data", "1.bitmap", "2.data", "2.bitmap", "3.data", "3.bitmap", "data"):
        (files.directory / name).touch()
    for name in ("data.new", "layout.json.new", "notes.txt"):
        (files.directory / name).touch()
    (files.directory / "snapshots").mkdir()
    layout = Layout(10, "3", "2", 10, None)
    files.write_layout(layout)
    files.sweep(layout)
    assert {path.name for path in files.directory.iterdir()} == {
        "layout.json", "2.data", "2.bitmap", "3.data", "3.bitmap", "snapshots", "notes.txt",
    }  # fmt: skip
