"""The FUSE tree, mounted for real: images never change, overlays keep what is written."""

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from support.fuse_server import FuseServer

from stratocache.cache.chunks import CHUNK_BYTES

pytestmark = pytest.mark.root

IMAGE = "GJtSZGNmkPcwlZmBVPYuzNSdoGa"
CONTENT = (
    Random(1).randbytes(2 * CHUNK_BYTES)
    + bytes(CHUNK_BYTES)
    + Random(2).randbytes(CHUNK_BYTES + 999)
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FuseServer]:
    """A server with one image, not yet started; its log must hold no error at the end."""
    made = FuseServer(tmp_path)
    made.add_image(IMAGE, CONTENT)
    yield made
    made.close()
    assert "Traceback" not in made.log()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image in a mounted tree that all tests share which change nothing."""
    made = FuseServer(tmp_path_factory.mktemp("tree"))
    path = made.add_image(IMAGE, CONTENT)
    made.start()
    yield path
    made.close()
    assert "Traceback" not in made.log()


@pytest.fixture
def overlay(server: FuseServer) -> Path:
    """An overlay disk over the image, larger than it, in a mounted tree."""
    path = server.add_overlay(IMAGE, len(CONTENT) + CHUNK_BYTES + 513)
    server.start()
    return path


def test_tree_lists_images_and_disks(server: FuseServer) -> None:
    """The root has two directories, and those have what the state database has."""
    path = server.add_overlay(IMAGE, len(CONTENT))
    server.start()
    listed = subprocess.run(
        ["ls", "-lR", server.mount_point], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert sorted(os.listdir(server.mount_point)) == ["disks", "images"]
    assert os.listdir(server.images) == [IMAGE]
    assert os.listdir(server.overlays) == [path.name]
    assert f"{len(CONTENT)}" in listed
    assert "-r--r--r--" in listed
    assert "-rw-------" in listed


def test_directory_longer_than_one_answer(server: FuseServer) -> None:
    """A listing of many images is complete and has nothing twice."""
    names = [f"{number:027d}" for number in range(700)]
    for name in names:
        server.add_image_row(name, 1)
    server.start()
    assert sorted(os.listdir(server.images)) == sorted([*names, IMAGE])


def test_image_has_its_exact_size_and_bytes(image: Path) -> None:
    """An image's size is to the byte, and so is what is read."""
    status = image.stat()
    assert status.st_size == len(CONTENT)
    assert status.st_mode & 0o7777 == 0o444
    assert status.st_blocks * 512 >= len(CONTENT)
    assert image.read_bytes() == CONTENT


def test_image_read_by_several_at_once(image: Path) -> None:
    """Readers at different places of an image nobody had open get their own bytes."""

    def read(seed: int) -> bool:
        random = Random(seed)
        descriptor = os.open(image, os.O_RDONLY)
        try:
            for _ in range(50):
                offset = random.randrange(len(CONTENT))
                size = random.randrange(1, 200_000)
                if os.pread(descriptor, size, offset) != CONTENT[offset : offset + size]:
                    return False
            return os.pread(descriptor, 10, len(CONTENT)) == b""
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_image_can_be_mapped(image: Path) -> None:
    """An image can be mapped into memory."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == CONTENT


def _open_for(flags: int) -> Callable[[Path], object]:
    return lambda path: os.open(path, flags)


@pytest.mark.parametrize(
    "change",
    [
        _open_for(os.O_WRONLY),
        _open_for(os.O_RDWR),
        _open_for(os.O_RDONLY | os.O_TRUNC),
        _open_for(os.O_WRONLY | os.O_APPEND),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, len(CONTENT)),
        lambda path: os.chmod(path, 0o666),
        lambda path: os.chown(path, 1, 1),
        lambda path: os.utime(path, (0, 0)),
        lambda path: os.unlink(path),
        lambda path: os.rename(path, path.with_name("other")),
        lambda path: os.link(path, path.with_name("other")),
        lambda path: os.symlink("x", path.with_name("other")),
        lambda path: os.mkdir(path.with_name("other")),
        lambda path: os.rmdir(path.parent),
        lambda path: os.mknod(path.with_name("other")),
        lambda path: path.with_name("other").write_bytes(b""),
    ],
    ids=[
        "open-write", "open-read-write", "open-truncate", "append", "truncate", "truncate-same",
        "chmod", "chown", "utime", "unlink", "rename", "link", "symlink", "mkdir", "rmdir",
        "mknod", "create",
    ],
)  # fmt: skip
def test_change_of_an_image_is_refused(image: Path, change: Callable[[Path], object]) -> None:
    """Whatever would change an image or its directory is EROFS or EACCES, root or not."""
    with pytest.raises(OSError) as caught:
        change(image)
    assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert image.read_bytes() == CONTENT
    assert os.listdir(image.parent) == [IMAGE]


def test_image_that_a_kernel_target_opened_for_writing_stays(tmp_path: Path) -> None:
    """With LIO, which opens every file so, root may; the first write is refused all the same."""
    server = FuseServer(tmp_path, opened_by_kernel=True)
    try:
        path = server.add_image(IMAGE, CONTENT)
        server.start()
        descriptor = os.open(path, os.O_RDWR)
        with pytest.raises(OSError) as caught:
            os.pwrite(descriptor, b"x", 0)
        assert caught.value.errno == errno.EROFS
        assert os.pread(descriptor, 100, 0) == CONTENT[:100]
        os.close(descriptor)
        with pytest.raises(OSError, match="Read-only"):
            os.open(path, os.O_WRONLY)
        assert path.read_bytes() == CONTENT
    finally:
        server.close()


def test_image_stays_readable_while_it_is_open_and_others_fail(image: Path) -> None:
    """A refused change does not disturb a reader."""
    with image.open("rb") as file:
        with pytest.raises(OSError, match="Read-only"):
            os.unlink(image)
        assert file.read() == CONTENT


def test_missing_name_can_appear_at_once(server: FuseServer) -> None:
    """A name that was looked up before it existed is found as soon as it exists."""
    server.start()
    late = server.images / ("L" * 27)
    assert not late.exists()
    server.add_image_row(late.name, 7)
    assert late.stat().st_size == 7


def test_deleted_name_goes_away(server: FuseServer) -> None:
    """A name that was looked up is gone soon after its image is."""
    server.start()
    image = server.images / IMAGE
    assert image.exists()
    server.remove_image_row(IMAGE)
    deadline = time.monotonic() + 5
    while image.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not image.exists()


def test_overlay_reads_its_base_and_keeps_writes(server: FuseServer, overlay: Path) -> None:
    """An overlay begins as its image and zeros; writes of any shape are read back."""
    size = overlay.stat().st_size
    model = bytearray(CONTENT.ljust(size, b"\0"))
    assert overlay.read_bytes() == model
    random = Random(9)
    descriptor = os.open(overlay, os.O_RDWR)
    for _ in range(100):
        offset = random.randrange(size)
        written = random.randbytes(min(random.choice([1, 512, 4096, 70_000]), size - offset))
        assert os.pwrite(descriptor, written, offset) == len(written)
        model[offset : offset + len(written)] = written
    os.fsync(descriptor)
    os.close(descriptor)
    assert overlay.read_bytes() == model
    assert (server.images / IMAGE).read_bytes() == CONTENT
    assert overlay.stat().st_blocks * 512 < size


def test_acknowledged_write_survives_the_server(server: FuseServer, overlay: Path) -> None:
    """What was written and never synced is there when a killed server has been replaced."""
    with overlay.open("r+b", buffering=0) as file:
        file.seek(12345)
        file.write(b"acknowledged")
    server.kill()
    server.start()
    with overlay.open("rb") as file:
        assert os.pread(file.fileno(), 12, 12345) == b"acknowledged"


def test_inode_numbers_are_the_same_in_the_next_process(server: FuseServer, overlay: Path) -> None:
    """Inodes and times follow from the state database, not from the process."""
    paths = [overlay, server.images / IMAGE, server.images, server.overlays]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
    server.kill()
    server.start()
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths] == before


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda path: os.truncate(path, 0), errno.EPERM),
        (lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC), errno.EPERM),
        (lambda path: os.chmod(path, 0o666), errno.EPERM),
        (lambda path: os.unlink(path), errno.EROFS),
        (lambda path: os.rename(path, path.with_name("other")), errno.EROFS),
        (lambda path: path.with_name("other").write_bytes(b""), errno.EROFS),
    ],
    ids=["truncate", "open-truncate", "chmod", "unlink", "rename", "create"],
)
def test_change_of_a_disks_file_is_refused(
    overlay: Path, change: Callable[[Path], object], number: int
) -> None:
    """A disk's bytes can be written, its size, mode and name cannot."""
    size = overlay.stat().st_size
    with pytest.raises(OSError) as caught:
        change(overlay)
    assert caught.value.errno == number
    assert overlay.stat().st_size == size


def test_write_past_the_end_of_a_disk_is_refused(overlay: Path) -> None:
    """A write across the end of a disk is ENOSPC, as on a block device."""
    size = overlay.stat().st_size
    descriptor = os.open(overlay, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="No space"):
            os.pwrite(descriptor, b"12345678", size - 4)
    finally:
        os.close(descriptor)
    assert overlay.stat().st_size == size


@pytest.mark.parametrize("option", ["--punch-hole", "--zero-range", "--keep-size"])
def test_allocation_calls_are_refused(overlay: Path, option: str) -> None:
    """fallocate(2) in any form is not supported, and says so."""
    refused = subprocess.run(
        ["fallocate", option, "--length", "4096", overlay], capture_output=True, check=False
    )
    assert refused.returncode != 0
    assert b"supported" in refused.stderr


def test_disk_is_closed_to_other_users(overlay: Path) -> None:
    """A user who is not root can read no disk."""
    refused = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", overlay],
        capture_output=True,
        check=False,
    )
    assert refused.returncode != 0
    assert b"ermission denied" in refused.stderr


def test_damaged_chunk_is_an_error_and_the_server_lives(server: FuseServer) -> None:
    """A chunk that fails its digest is EIO for its reader; everything else goes on."""
    files = (server.state_dir / "chunks").rglob("*")
    chunk = max(path for path in files if path.is_file() and path.stat().st_size == CHUNK_BYTES)
    chunk.chmod(0o600)
    chunk.write_bytes(b"wrong" * 100)
    server.start()
    path = server.images / IMAGE
    with pytest.raises(OSError, match="Input/output"):
        path.read_bytes()
    assert server.running
    assert path.stat().st_size == len(CONTENT)


def test_statfs_is_that_of_the_state_directory(server: FuseServer) -> None:
    """`df` of the mount says what is free where disks grow."""
    server.start()
    below, found = os.statvfs(server.state_dir), os.statvfs(server.images)
    assert found.f_blocks * found.f_frsize == below.f_blocks * below.f_frsize
    assert found.f_bavail > 0
