"""Mounting a cached image on the host: its partition found, nothing written, nothing left behind.

Runs as root in the process of the command line, on the image's file in the FUSE tree. Partitions
are read by sfdisk(8), file systems recognised by blkid(8), mounted by mount(8) through a loop
device that the kernel removes with the mount. The kernel's own tables say what is mounted; there
is no record of ours to go stale.
"""

import json
import os
import re
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from stratocache.cache.errors import Conflict, InvalidInput, NotFound, Refused, Unreachable

_TIMEOUT_S = 60
_RELEASE_TIMEOUT_S = 5
_PARTITIONS_MAX = 256

_OPTIONS = {
    "ext2": "",
    "ext3": ",noload",
    "ext4": ",noload",
    "xfs": ",norecovery,nouuid",
    "btrfs": ",rescue=nologreplay",
    "vfat": "",
    "exfat": "",
    "iso9660": "",
    "udf": "",
    "squashfs": "",
    "erofs": "",
}
"""File systems that are mounted, a closed list, with what keeps each from replaying a journal."""

_IMAGE_FILE = re.compile(r".*/images/([A-Za-z0-9_-]{27})")
_NODE_NUMBER = re.compile(r"(\d+)$")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of an image that can be mounted."""

    number: int | None
    """As the partition table counts; None is the whole image."""
    start_bytes: int
    size_bytes: int
    file_system: str


@dataclass(frozen=True, slots=True)
class MountedImage:
    """What `mount_image` did."""

    image_id: str
    directory: Path
    partition: Partition


@dataclass(frozen=True, slots=True)
class _Mount:
    directory: Path
    loop_device: str
    image_file: Path


def mount_image(block_file: Path, directory: Path, partition: int | None) -> MountedImage:
    """Mount an image's file system read-only; without a number the only mountable one is taken.

    The journal is not replayed, devices and set-user-id programs of the image have no effect.
    Raises `InvalidInput` (`not-an-image`, `mount-point-missing`, `partition-missing`,
    `partition-ambiguous`, `partition-unmountable`), `NotFound` (`image-unknown`), `Conflict`
    (`mount-point-busy`), `Refused` (`root-needed`), `Unreachable` (`mount-timeout`).
    """
    _require_root()
    matched = _IMAGE_FILE.fullmatch(str(block_file))
    if matched is None:
        raise InvalidInput("not-an-image", f"{block_file} is not the file of an image.")
    if not block_file.is_file():
        raise NotFound("image-unknown", f"{block_file} is not there; is the daemon running?")
    if not directory.is_dir():
        raise InvalidInput(
            "mount-point-missing",
            f"{directory} is no directory; create it first.",
            field="directory",
        )
    if os.path.ismount(directory):
        raise Conflict(
            "mount-point-busy", f"Something is mounted on {directory}; unmount it first."
        )
    chosen = _choose(block_file, partition)
    options = (
        f"ro,loop,nosuid,nodev,offset={chosen.start_bytes},sizelimit={chosen.size_bytes}"
        f"{_OPTIONS[chosen.file_system]}"
    )
    mounted = _run(
        ["mount", "-t", chosen.file_system, "-o", options, "--", str(block_file), str(directory)]
    )
    if mounted.returncode != 0:
        raise InvalidInput(
            "partition-unmountable",
            f"The {chosen.file_system} file system of {matched[1]} cannot be mounted: "
            f"{mounted.stderr.strip() or mounted.returncode}.",
        )
    return MountedImage(matched[1], directory, chosen)


def unmount_image(directory: Path) -> None:
    """Undo `mount_image`, and wait until its loop device is free.

    Raises `InvalidInput` (`not-an-image-mount`), `Conflict` (`mount-busy`), `Refused`
    (`root-needed`), `Unreachable` (`mount-timeout`).
    """
    _require_root()
    path = Path(os.path.realpath(directory))
    here = [mount for mount in _image_mounts() if mount.directory == path]
    if not here:
        raise InvalidInput(
            "not-an-image-mount", f"No image is mounted on {directory}.", field="directory"
        )
    unmounted = _run(["umount", "--", str(path)])
    if unmounted.returncode != 0:
        raise Conflict(
            "mount-busy",
            f"{directory} cannot be unmounted: {unmounted.stderr.strip() or unmounted.returncode}.",
        )
    _wait_for_release(here[-1])


def mounted_images(blocks: Path) -> dict[str, list[Path]]:
    """Return, by image, the directories on which images of the tree `blocks` are mounted."""
    # the tree itself is not touched: it may have nobody who answers
    images = Path(os.path.realpath(blocks.parent)) / blocks.name / "images"
    found: dict[str, list[Path]] = defaultdict(list)
    for mount in _image_mounts():
        if mount.image_file.parent == images:
            found[mount.image_file.name].append(mount.directory)
    return dict(found)


def partitions(block_file: Path) -> list[Partition]:
    """Return what can be mounted of an image: itself, when it is a file system, and partitions."""
    size_bytes = block_file.stat().st_size
    ranges: list[tuple[int | None, int, int]] = [(None, 0, size_bytes), *_table(block_file)]
    return [
        Partition(number, start, size, file_system)
        for number, start, size in ranges
        if start + size <= size_bytes
        and (file_system := _file_system(block_file, start, size)) is not None
    ]


def _choose(block_file: Path, number: int | None) -> Partition:
    found = partitions(block_file)
    if number is not None:
        for candidate in found:
            if candidate.number == number:
                return candidate
        raise InvalidInput(
            "partition-missing",
            f"The image has no mountable partition {number}; it has {_list(found)}.",
            field="partition",
        )
    if not found:
        raise InvalidInput(
            "partition-unmountable", "The image has no file system that can be mounted here."
        )
    if len(found) > 1 and found[0].number is not None:
        raise InvalidInput(
            "partition-ambiguous",
            f"The image has {_list(found)}; choose one with --partition N.",
            field="partition",
        )
    return found[0]


def _list(found: list[Partition]) -> str:
    return ", ".join(
        f"partition {each.number} ({each.size_bytes} bytes, {each.file_system})"
        if each.number is not None
        else f"one {each.file_system} file system without a partition table"
        for each in found
    ) or "none"  # fmt: skip


def _table(block_file: Path) -> list[tuple[int | None, int, int]]:
    """Return number, start and size in bytes of each partition, none without a table."""
    listed = _run(["sfdisk", "--json", "--", str(block_file)])
    if listed.returncode != 0:
        return []
    table = json.loads(listed.stdout)["partitiontable"]
    sector_bytes = int(table.get("sectorsize", 512))
    found: list[tuple[int | None, int, int]] = []
    for entry in table.get("partitions", [])[:_PARTITIONS_MAX]:
        matched = _NODE_NUMBER.search(entry["node"])
        if matched is not None:
            start, size = int(entry["start"]) * sector_bytes, int(entry["size"]) * sector_bytes
            found.append((int(matched[1]), start, size))
    return found


def _file_system(block_file: Path, start_bytes: int, size_bytes: int) -> str | None:
    """Return the type of a mountable file system that lies there alone (blkid(8), low-level)."""
    probed = _run(
        ["blkid", "--probe", "--output", "export", "--offset", str(start_bytes),
         "--size", str(size_bytes), "--", str(block_file)]
    )  # fmt: skip
    fields = dict(line.split("=", 1) for line in probed.stdout.splitlines() if "=" in line)
    kind = fields.get("TYPE", "")
    return kind if fields.get("USAGE") == "filesystem" and kind in _OPTIONS else None


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Refused("root-needed", "Mounting an image needs root; run this with sudo.")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(
            "mount-timeout", f"{command[0]} did not end; does the daemon answer?"
        ) from None


def _image_mounts() -> list[_Mount]:
    """Return the mounts of loop devices over image files, in the order in which they were made."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        # proc(5): the mount point is field 5; type, source and options follow a lone hyphen
        before, _, after = line.partition(" - ")
        source = after.split(" ")[1]
        if not source.startswith("/dev/loop"):
            continue
        backing = _backing_file(source)
        if backing is not None and _IMAGE_FILE.fullmatch(backing):
            directory = _ESCAPE.sub(lambda code: chr(int(code[1], 8)), before.split(" ")[4])
            found.append(_Mount(Path(directory), source, Path(backing)))
    return found


def _backing_file(loop_device: str) -> str | None:
    try:
        path = Path("/sys/block") / Path(loop_device).name / "loop/backing_file"
        return path.read_text(errors="surrogateescape").rstrip("\n").removesuffix(" (deleted)")
    except FileNotFoundError:
        return None


def _wait_for_release(ended: _Mount) -> None:
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while time.monotonic() < deadline:
        others = [mount for mount in _image_mounts() if mount.loop_device == ended.loop_device]
        if others or _backing_file(ended.loop_device) != str(ended.image_file):
            return
        time.sleep(0.01)
    # somebody else looked at the device while it was to go: the kernel forgot to remove it
    _run(["losetup", "--detach", ended.loop_device])
