"""Mounting images on the host with the real tools; no test may leave a loop device."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fuse_server import FuseServer

from stratocache.cache.errors import Conflict, InvalidInput, NotFound
from stratocache.fs.partition import mount_image, mounted_images, partitions, unmount_image

pytestmark = pytest.mark.root

MIB = 1024**2
IMAGE = "GJtSZGNmkPcwlZmBVPYuzNSdoGa"


def run(*command: str | Path, text: str | None = None) -> None:
    """Run a program that must succeed."""
    subprocess.run(command, check=True, input=text, capture_output=True, text=True)


def make_file_system(path: Path, kind: str, size: int, greeting: str) -> None:
    """Make a file system of a kind with one file in it, in a file of its own."""
    with path.open("wb") as file:
        file.truncate(size)
    content = path.with_name(path.name + ".content")
    content.mkdir()
    (content / "greeting").write_text(greeting)
    if kind == "ext4":
        run("mkfs.ext4", "-q", "-d", content, path)
    else:
        run("mkfs.xfs", "-q", path)
        run("mount", "-o", "loop", path, content)
        (content / "greeting").write_text(greeting)
        run("umount", content)
    shutil.rmtree(content)


def assemble(path: Path, script: str, parts: dict[int, Path]) -> None:
    """Make an image with a partition table, and file systems at offsets in MiB."""
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    run("sfdisk", "-q", path, text=script)
    with path.open("r+b") as file:
        for offset_mib, part in parts.items():
            file.seek(offset_mib * MIB)
            file.write(part.read_bytes())


def loop_devices(path: Path) -> str:
    """Return the loop devices over a file."""
    found = subprocess.run(["losetup", "-j", path], check=True, capture_output=True, text=True)
    return found.stdout


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A mount point with a name that mountinfo has to escape."""
    made = tmp_path / "mount point"
    made.mkdir()
    return made


@pytest.fixture
def image(tmp_path: Path, directory: Path) -> Iterator[Path]:
    """The path of an image, to be made by the test; no loop device may be over it at the end."""
    path = tmp_path / "blocks/images" / IMAGE
    path.parent.mkdir(parents=True)
    yield path
    left, mounted = loop_devices(path), os.path.ismount(directory)
    if mounted:
        run("umount", directory)
    assert not mounted
    assert left == ""


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A small ext4 file system."""
    path = tmp_path / "ext4"
    make_file_system(path, "ext4", 16 * MIB, "from ext4")
    return path


ONE_LINUX = (
    "label: dos\nstart=1MiB, size=1MiB, type=83\nstart=8MiB, size=16MiB, type=83, bootable\n"
)
TWO_LINUX = "label: gpt\nstart=8MiB, size=16MiB, type=L\nstart=32MiB, size=16MiB, type=L\n"


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_only_file_system_among_partitions_is_mounted(
    image: Path, directory: Path, ext4: Path, label: str
) -> None:
    """The partition with a file system is found, mounted read-only, and leaves no trace."""
    script = ONE_LINUX.replace("dos", label).replace(", bootable", "")
    assemble(image, script if label == "dos" else script.replace("type=83", "type=L"), {8: ext4})
    before = digest(image)
    mounted = mount_image(image, directory, None)
    assert (mounted.image_id, mounted.partition.number) == (IMAGE, 2)
    assert (directory / "greeting").read_text() == "from ext4"
    with pytest.raises(OSError, match="Read-only"):
        (directory / "new").touch()
    assert mounted_images(image.parent.parent) == {IMAGE: [directory]}
    unmount_image(directory)
    assert mounted_images(image.parent.parent) == {}
    assert digest(image) == before


def test_image_without_a_table_is_mounted_whole(image: Path, directory: Path, ext4: Path) -> None:
    """An image that is a file system is mounted as it is."""
    ext4.rename(image)
    mounted = mount_image(image, directory, None)
    assert mounted.partition.number is None
    assert (directory / "greeting").read_text() == "from ext4"
    unmount_image(directory)


def test_logical_partition_is_found(image: Path, directory: Path, ext4: Path) -> None:
    """A partition inside an extended one keeps the number that the kernel gives it."""
    assemble(
        image,
        "label: dos\nstart=4MiB, size=40MiB, type=5\nstart=8MiB, size=16MiB, type=83\n",
        {8: ext4},
    )
    assert mount_image(image, directory, None).partition.number == 5
    unmount_image(directory)


def test_several_file_systems_need_a_number(
    image: Path, directory: Path, ext4: Path, tmp_path: Path
) -> None:
    """With two mountable partitions the choice is the user's, who is told what there is."""
    other = tmp_path / "other"
    make_file_system(other, "ext4", 16 * MIB, "from the other")
    assemble(image, TWO_LINUX, {8: ext4, 32: other})
    with pytest.raises(InvalidInput) as caught:
        mount_image(image, directory, None)
    assert caught.value.code == "partition-ambiguous"
    assert "partition 1 (16777216 bytes, ext4), partition 2 (16777216 bytes, ext4)" in str(
        caught.value
    )
    with pytest.raises(InvalidInput) as caught:
        mount_image(image, directory, 3)
    assert caught.value.code == "partition-missing"
    assert mount_image(image, directory, 2).partition.start_bytes == 32 * MIB
    assert (directory / "greeting").read_text() == "from the other"
    unmount_image(directory)


@pytest.mark.parametrize(("kind", "size"), [("ext4", 64 * MIB), ("xfs", 320 * MIB)])
def test_journal_is_not_replayed(
    image: Path, directory: Path, tmp_path: Path, kind: str, size: int
) -> None:
    """An image taken from a running machine is mounted without a byte of it changing."""
    running, copied = tmp_path / "running", tmp_path / "work"
    copied.mkdir()
    make_file_system(running, kind, size, "before")
    run("mount", "-o", "loop", running, copied)
    try:
        for number in range(20):
            (copied / f"file{number}").write_text("x" * 1000)
        os.sync()
        run("cp", "--sparse=always", running, image)
    finally:
        run("umount", copied)
    assert digest(running) != digest(image)
    before = digest(image)
    assert mount_image(image, directory, None).partition.file_system == kind
    assert (directory / "greeting").read_text() == "before"
    unmount_image(directory)
    assert digest(image) == before


@pytest.mark.parametrize("content", [b"", b"\0" * MIB, bytes(range(256)) * 4096])
def test_image_without_a_file_system_is_refused(
    image: Path, directory: Path, content: bytes
) -> None:
    """Bytes that are no file system are refused with a sentence, and nothing is left."""
    image.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        mount_image(image, directory, None)
    assert caught.value.code == "partition-unmountable"


def test_damaged_file_system_is_refused(image: Path, directory: Path, ext4: Path) -> None:
    """A file system that the kernel refuses is an error with the kernel's words, no loop device."""
    with ext4.open("r+b") as file:
        file.seek(1024 + 32)
        file.write(b"\xff" * 12)
    ext4.rename(image)
    with pytest.raises(InvalidInput) as caught:
        mount_image(image, directory, None)
    assert caught.value.code == "partition-unmountable"


def test_partition_outside_the_image_is_refused(image: Path, directory: Path, ext4: Path) -> None:
    """A partition that ends behind the image is not offered."""
    assemble(image, ONE_LINUX, {8: ext4})
    os.truncate(image, 20 * MIB)
    assert partitions(image) == []


def test_mount_points_are_checked(image: Path, directory: Path, ext4: Path) -> None:
    """A missing directory, a busy one, a missing image and a foreign file each have their error."""
    ext4.rename(image)
    with pytest.raises(InvalidInput) as missing:
        mount_image(image, directory / "none", None)
    assert missing.value.code == "mount-point-missing"
    with pytest.raises(NotFound):
        mount_image(image.with_name("N" * 27), directory, None)
    with pytest.raises(InvalidInput) as foreign:
        mount_image(Path("/etc/passwd"), directory, None)
    assert foreign.value.code == "not-an-image"
    mount_image(image, directory, None)
    with pytest.raises(Conflict) as busy:
        mount_image(image, directory, None)
    assert busy.value.code == "mount-point-busy"
    unmount_image(directory)


def test_busy_mount_is_not_unmounted(image: Path, directory: Path, ext4: Path) -> None:
    """A mount with an open file stays, with an error that says so."""
    ext4.rename(image)
    mount_image(image, directory, None)
    with (directory / "greeting").open(), pytest.raises(Conflict) as caught:
        unmount_image(directory)
    assert caught.value.code == "mount-busy"
    unmount_image(directory)


def test_only_our_own_mounts_are_unmounted(image: Path, directory: Path) -> None:
    """A directory with nothing, or with somebody else's mount on it, is left alone."""
    with pytest.raises(InvalidInput) as caught:
        unmount_image(directory)
    assert caught.value.code == "not-an-image-mount"
    run("mount", "-t", "tmpfs", "none", directory)
    try:
        with pytest.raises(InvalidInput):
            unmount_image(directory)
        assert os.path.ismount(directory)
    finally:
        run("umount", directory)


def test_one_image_on_two_directories(image: Path, directory: Path, ext4: Path) -> None:
    """Two mounts of one image end one by one."""
    ext4.rename(image)
    second = directory.with_name("second")
    second.mkdir()
    mount_image(image, directory, None)
    mount_image(image, second, None)
    assert mounted_images(image.parent.parent) == {IMAGE: [directory, second]}
    unmount_image(directory)
    assert (second / "greeting").read_text() == "from ext4"
    unmount_image(second)


def test_image_of_the_tree_is_mounted(tmp_path: Path, directory: Path, ext4: Path) -> None:
    """An image in the FUSE tree is mounted, listed, unmounted; the tree can then be unmounted."""
    disk = tmp_path / "disk"
    assemble(disk, ONE_LINUX, {8: ext4})
    server = FuseServer(tmp_path)
    try:
        path = server.add_image(IMAGE, disk.read_bytes())
        server.start()
        mount_image(path, directory, None)
        assert (directory / "greeting").read_text() == "from ext4"
        assert mounted_images(server.mount_point) == {IMAGE: [directory]}
        unmount_image(directory)
        assert loop_devices(path) == ""
        server.stop()
        assert not os.path.ismount(server.mount_point)
    finally:
        server.close()
