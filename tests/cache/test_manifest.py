"""Manifests are casync's: our files are its files, and no damaged one is read."""

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratocache.cache import castr
from stratocache.cache.chunks import CHUNK_BYTES, zero_digest
from stratocache.cache.errors import NotVerified
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest

TIB = 1024**4


def _image(tail_bytes: int) -> bytes:
    """Three data chunks, two of zeros, a repeat, and a tail."""
    block = hashlib.shake_128(b"image").digest(3 * CHUNK_BYTES)
    tail = hashlib.shake_128(b"tail").digest(tail_bytes)
    return block + bytes(2 * CHUNK_BYTES) + block[:CHUNK_BYTES] + tail


def _manifest(image: bytes) -> Manifest:
    starts = range(0, len(image), CHUNK_BYTES)
    digests = (hashlib.sha256(image[start : start + CHUNK_BYTES]).digest() for start in starts)
    return Manifest(len(image), b"".join(digests))


def _publish(images: ImageStore, identifier: str, image: bytes) -> None:
    draft = images.begin()
    draft.add([image[start : start + CHUNK_BYTES] for start in range(0, len(image), CHUNK_BYTES)])
    images.publish(identifier, draft.manifest())
    images.finish(draft)


def _casync_make(index: Path, image: Path) -> None:
    subprocess.run(
        [
            "casync", "make", "--digest=sha256", f"--store={index.parent / 'theirs.castr'}",
            f"--chunk-size={CHUNK_BYTES}:{CHUNK_BYTES}:{CHUNK_BYTES}", index, image,
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("tail_bytes", [0, 1, 4096, CHUNK_BYTES - 1])
def test_our_index_is_byte_for_byte_what_casync_makes(tmp_path: Path, tail_bytes: int) -> None:
    """For one image, odd tails included, `casync make` and we write the same file."""
    image = _image(tail_bytes)
    (tmp_path / "image").write_bytes(image)
    _casync_make(tmp_path / "theirs.caibx", tmp_path / "image")

    _manifest(image).write(tmp_path / "ours.caibx")

    assert (tmp_path / "ours.caibx").read_bytes() == (tmp_path / "theirs.caibx").read_bytes()


def test_an_empty_image_has_an_empty_index(tmp_path: Path) -> None:
    """No bytes, no chunks: still the file that casync writes, and it reads back."""
    (tmp_path / "image").write_bytes(b"")
    _casync_make(tmp_path / "theirs.caibx", tmp_path / "image")

    Manifest(0, b"").write(tmp_path / "ours.caibx")

    assert (tmp_path / "ours.caibx").read_bytes() == (tmp_path / "theirs.caibx").read_bytes()
    assert Manifest.read(tmp_path / "ours.caibx", image_bytes_max=0) == Manifest(0, b"")


@pytest.mark.parametrize("tail_bytes", [0, 70001])
def test_casync_rebuilds_an_image_from_our_index_and_export(
    images: ImageStore, tmp_path: Path, tail_bytes: int
) -> None:
    """`casync extract` makes the same bytes from what we publish and export."""
    image = _image(tail_bytes)
    _publish(images, "image", image)

    written = castr.export(images.reader("image"), tmp_path / "ours.castr")
    shutil.copy(images.manifest_path("image"), tmp_path / "image.caibx")
    subprocess.run(
        [
            "casync", "extract", f"--store={tmp_path / 'ours.castr'}",
            tmp_path / "image.caibx", tmp_path / "rebuilt",
        ],
        check=True,
    )  # fmt: skip

    assert (tmp_path / "rebuilt").read_bytes() == image
    assert written == (5 if tail_bytes else 4)
    assert castr.export(images.reader("image"), tmp_path / "ours.castr") == 0


@given(size_bytes=st.integers(0, 40 * CHUNK_BYTES), seed=st.binary(max_size=8))
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, size_bytes: int, seed: bytes
) -> None:
    """Any size and any digests survive writing and reading."""
    count = -(-size_bytes // CHUNK_BYTES)
    manifest = Manifest(size_bytes, hashlib.shake_128(seed).digest(32 * count))
    path = tmp_path_factory.getbasetemp() / "round-trip.caibx"

    manifest.write(path)

    assert Manifest.read(path, image_bytes_max=size_bytes) == manifest


def _put(offset: int, *numbers: int) -> Callable[[bytes], bytes]:
    """Return a change that writes 64-bit numbers at an offset, counted from the end if negative."""

    def put(content: bytes) -> bytes:
        data = bytearray(content)
        struct.pack_into(f"<{len(numbers)}Q", data, offset % len(data), *numbers)
        return bytes(data)

    return put


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[:-1],
    "item missing": lambda content: content[:64] + content[104:],
    "magic": _put(8, 0x96824D9C7B129FF8),
    "sha512-256": _put(16, 0xB000000000000000),
    "other chunk size": _put(24, 65536, 65536, 65536),
    "ends fall": _put(64 + 40, CHUNK_BYTES - 1),
    "ends repeat": _put(64 + 40, CHUNK_BYTES),
    "end is huge": _put(64 + 5 * 40, 2**64 - 1),
    "short chunk inside": _put(64, CHUNK_BYTES - 4096),
    "tail": _put(-8, 0x4B4F050E5549ECD0),
    "table size": _put(-16, 12345),
}


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_index_is_refused(tmp_path: Path, change: str) -> None:
    """Each way in which an index can be wrong is one error that names the file."""
    path = tmp_path / "image.caibx"
    _manifest(_image(0)).write(path)
    path.write_bytes(DAMAGES[change](path.read_bytes()))

    with pytest.raises(NotVerified, match=r"image\.caibx") as caught:
        Manifest.read(path, image_bytes_max=TIB)

    assert caught.value.code == "manifest-invalid"


def test_a_huge_index_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte costs no memory."""
    path = tmp_path / "image.caibx"
    path.touch()
    os.truncate(path, TIB)

    with pytest.raises(NotVerified, match="more than an image may need"):
        Manifest.read(path, image_bytes_max=1024**3)


def test_an_index_of_a_bigger_image_than_allowed_is_refused(tmp_path: Path) -> None:
    """The limit counts the image's bytes, not only the file's."""
    path = tmp_path / "image.caibx"
    _manifest(_image(10)).write(path)

    with pytest.raises(NotVerified, match="over the limit"):
        Manifest.read(path, image_bytes_max=6 * CHUNK_BYTES + 9)


def test_zero_chunks_are_known_without_a_store() -> None:
    """Full and short chunks of zeros are recognised by digest and size."""
    manifest = _manifest(_image(0) + bytes(1000))

    assert [manifest.is_zero(index) for index in range(7)] == [False] * 3 + [True] * 2 + [
        False,
        True,
    ]
    assert len(list(manifest.stored())) == 4
    assert zero_digest(0).hex().startswith("e3b0c44298fc1c14")
    with pytest.raises(IndexError):
        manifest.digest(7)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    """When the name is taken by a directory nothing temporary stays."""
    (tmp_path / "image.caibx" / "x").mkdir(parents=True)

    with pytest.raises(OSError, match="directory"):
        _manifest(_image(0)).write(tmp_path / "image.caibx")

    assert [path.name for path in tmp_path.iterdir()] == ["image.caibx"]
