"""qcow2 files made by the real qemu-img: sound ones convert, treacherous ones are refused."""

import hashlib
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import trio

from stratocache.cache import conversion
from stratocache.cache.errors import NoSpace, NotVerified
from stratocache.cache.space import Space

MIB = 1024**2
LIMIT = 1024 * MIB


def _qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)


def _raw(path: Path, size_bytes: int = 8 * MIB) -> bytes:
    data = bytearray(size_bytes)
    data[MIB : MIB + 70000] = hashlib.shake_128(b"disk").digest(70000)
    path.write_bytes(data)
    return bytes(data)


def _inspect(path: Path) -> int:
    async def inspect() -> int:
        return await conversion.inspect(path, image_bytes_max=LIMIT)

    return trio.run(inspect)


def _refusal(path: Path) -> NotVerified:
    with pytest.raises(NotVerified) as caught:
        _inspect(path)
    assert [p.name for p in path.parent.glob("*.json")] == []
    return caught.value


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "compat=0.10"],
        ["-o", "compat=1.1"],
        ["-c"],
        ["-c", "-o", "compression_type=zstd"],
        ["-o", "extended_l2=on,cluster_size=128k"],
    ],
)
def test_every_usual_kind_of_qcow2_converts(tmp_path: Path, options: list[str]) -> None:
    """Old and new, compressed either way or with subclusters: the raw bytes come back, sparse."""
    data = _raw(tmp_path / "raw")
    _qemu_img("convert", "-O", "qcow2", *options, tmp_path / "raw", tmp_path / "container")
    size_bytes = _inspect(tmp_path / "container")

    async def convert() -> None:
        space = Space(tmp_path, 0)
        await conversion.convert(
            tmp_path / "container", tmp_path / "image", size_bytes=size_bytes, space=space
        )

    trio.run(convert)
    assert (tmp_path / "image").read_bytes() == data
    assert (tmp_path / "image").stat().st_blocks * 512 < MIB


def test_a_backing_file_is_refused(tmp_path: Path) -> None:
    """An overlay over another file of this host does not get it into an image."""
    _raw(tmp_path / "secret")
    _qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", tmp_path / "c")

    assert _refusal(tmp_path / "c").code == "image-backing-file"


def test_an_external_data_file_is_refused(tmp_path: Path) -> None:
    """A qcow2 file whose clusters lie in another file is refused like a backing file."""
    _qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'd'}", tmp_path / "c", "8M")

    assert _refusal(tmp_path / "c").code == "image-backing-file"


@pytest.mark.parametrize("method", [1, 2])
def test_encryption_is_refused(tmp_path: Path, method: int) -> None:
    """A container that says it is AES or LUKS encrypted cannot be verified or booted."""
    _qemu_img("create", "-f", "qcow2", tmp_path / "c", "8M")
    with (tmp_path / "c").open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", method))

    refusal = _refusal(tmp_path / "c")

    assert (refusal.code, "encrypted" in refusal.message) == ("image-format", True)


def test_an_absurd_size_is_refused(tmp_path: Path) -> None:
    """Two hundred kilobytes that claim an exabyte are over the limit."""
    _qemu_img("create", "-f", "qcow2", tmp_path / "c", "8M")
    with (tmp_path / "c").open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", 2**60))

    assert _refusal(tmp_path / "c").code == "image-too-large"


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"#!/bin/sh\n" * 100, bytes(70000)])
def test_what_is_not_qcow2_is_refused(tmp_path: Path, content: bytes) -> None:
    """The format is never guessed: no other content is taken for an image."""
    (tmp_path / "c").write_bytes(content)

    assert _refusal(tmp_path / "c").code == "image-format"


@pytest.mark.parametrize(("offset", "value"), [(4, 9), (72 + 4, 0x4000)])
def test_unknown_versions_and_features_are_refused(tmp_path: Path, offset: int, value: int) -> None:
    """A version or an incompatible feature that we do not know is not passed on to QEMU."""
    _qemu_img("create", "-f", "qcow2", tmp_path / "c", "8M")
    with (tmp_path / "c").open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">I", value))

    assert _refusal(tmp_path / "c").code == "image-format"


def test_a_damaged_image_is_refused(tmp_path: Path) -> None:
    """Tables that point nowhere are found out by qemu-img, whose words are passed on."""
    _raw(tmp_path / "raw")
    _qemu_img("convert", "-O", "qcow2", tmp_path / "raw", tmp_path / "c")
    with (tmp_path / "c").open("r+b") as file:
        file.seek(40)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        file.write(b"\xff" * 8)

    async def convert() -> None:
        space = Space(tmp_path, 0)
        await conversion.convert(tmp_path / "c", tmp_path / "i", size_bytes=8 * MIB, space=space)

    with pytest.raises(NotVerified, match="qemu-img") as caught:
        trio.run(convert)
    assert caught.value.code == "image-format"


def test_conversion_stops_when_the_reserve_is_touched(tmp_path: Path) -> None:
    """No space beside the reserve ends the conversion with its own error."""
    _raw(tmp_path / "raw")
    _qemu_img("convert", "-O", "qcow2", tmp_path / "raw", tmp_path / "c")

    async def convert() -> None:
        space = Space(tmp_path, 2**62)
        await conversion.convert(tmp_path / "c", tmp_path / "i", size_bytes=8 * MIB, space=space)

    with pytest.raises(NoSpace) as caught:
        trio.run(convert)
    assert caught.value.code == "no-space"


def test_cancelling_leaves_no_process(tmp_path: Path) -> None:
    """A conversion cancelled while it runs is gone when cancelling returns."""
    _raw(tmp_path / "raw", 64 * MIB)
    _qemu_img("convert", "-O", "qcow2", tmp_path / "raw", tmp_path / "c")

    async def check() -> None:
        with trio.move_on_after(0):
            await conversion.convert(
                tmp_path / "c", tmp_path / "i", size_bytes=64 * MIB, space=Space(tmp_path, 0)
            )

    trio.run(check)
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False)
    assert running.stdout == b""
    assert threading.active_count() < 20
