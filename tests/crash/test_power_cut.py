"""Power cuts on real files, below a real ext4.

Method: a file-level recorder. The engine that ships serves an overlay over FUSE; a loop device and
ext4 are on it, and a workload writes and fsyncs through them while the disk is snapshotted, filled
and at last promoted. Below the engine is a storage that makes every call on real files and logs it.
A cut is replayed from the log into an empty directory: what an ended sync covers, and of all that
came later any sectors and any names (`support.recorder`).

It is honest because nothing is guessed about the engine: the log is below it, a position in the log
is read only after the kernel has returned from the guest's fsync, and a sync covers only what had
been written before it *began*. It is harder than pulling a plug, which loses only what one
particular device had not yet written. Not covered: chunk store and manifests, which are complete
before the engine is told of them, and the host's own file system, which is assumed to keep
assumptions 1 to 4 of CRASH.md. No device-mapper is needed, which not every kernel has.

CRASH_CUTS is how many cuts are replayed, CRASH_SEED chooses them.
"""

import hashlib
import os
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from shutil import rmtree

import pytest
import trio
from support.recorder import Recording
from support.recording_server import BUGS, RecordingServer

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.errors import NotFound, NotVerified
from stratocache.cache.images import ImageStore
from stratocache.fs.disks import DiskStore
from stratocache.fs.layer_check import LayerFiles, check_layer

CUTS = int(os.environ.get("CRASH_CUTS", "24"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
MIB = 1024**2
DISK_BYTES = 32 * MIB
BASE_BYTES = 24 * MIB
SLOTS = 2048
"""Records of a file of the image: most of what an overwrite shares a block with is still the image's."""
SLOT_BYTES = 512
OPERATIONS_MIN = 200
PLANTED_MAX = 400
"""Cuts within which a planted bug must be found."""
IMAGE = "base"

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300 + 5 * CUTS)]


@dataclass(frozen=True)
class Deed:
    """Something that the workload did, and when: positions in the log."""

    what: str
    name: str
    value: bytes
    began: int
    synced: int


@dataclass
class Story:
    """A workload that has run: where its log and its disk are, and what it was promised."""

    server: RecordingServer
    uuid: str
    recording: Recording
    deeds: list[Deed] = field(default_factory=list)


class Workload:
    """Files that are made, overwritten and removed in an ext4, each step fsynced."""

    def __init__(self, root: Path, server: RecordingServer, random: Random) -> None:
        self._root = root
        self._server = server
        self._random = random
        self._versions = [0] * SLOTS
        self._files: list[str] = []
        self.deeds: list[Deed] = []
        self._slots = os.open(root / "slots", os.O_RDWR)

    def close(self) -> None:
        """Close what is open."""
        os.close(self._slots)

    def step(self) -> None:
        """Do one thing, and note when it was begun and when it was durable."""
        # never synced: what the journal carries along may be there or not
        (self._root / "noise").write_bytes(self._random.randbytes(self._random.randrange(30_000)))
        began = self._server.position()
        draw = self._random.random()
        if draw < 0.5:
            what, name, value = self._overwrite()
        elif draw < 0.9 or not self._files:
            what, name, value = self._create()
        else:
            what, name, value = self._remove()
        self.deeds.append(Deed(what, name, value, began, self._server.position()))

    def _overwrite(self) -> tuple[str, str, bytes]:
        slot = self._random.randrange(SLOTS)
        self._versions[slot] += 1
        value = slot_content(slot, self._versions[slot])
        os.pwrite(self._slots, value, slot * SLOT_BYTES)
        os.fdatasync(self._slots)
        return "slot", str(slot), self._versions[slot].to_bytes(4, "big")

    def _create(self) -> tuple[str, str, bytes]:
        name = f"record-{len(self.deeds)}"
        content = self._random.randbytes(self._random.randrange(1, 40_000))
        with (self._root / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._sync(self._root)
        self._files.append(name)
        return "made", name, hashlib.sha256(content).digest()

    def _remove(self) -> tuple[str, str, bytes]:
        name = self._files.pop(self._random.randrange(len(self._files)))
        (self._root / name).unlink()
        self._sync(self._root)
        return "removed", name, b""

    @staticmethod
    def _sync(directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def slot_content(slot: int, version: int) -> bytes:
    """Return the sector of a slot at a version, which tells both."""
    return version.to_bytes(4, "big") + Random(slot * 2**32 + version).randbytes(SLOT_BYTES - 4)


def faults_of(root: Path, deeds: list[Deed], position: int) -> list[str]:
    """Return in which ways a file system is not what a cut at that position may leave."""
    done = [deed for deed in deeds if deed.synced <= position]
    begun = {(deed.what, deed.name) for deed in deeds if deed.began < position}
    removed = {deed.name for deed in done if deed.what == "removed"}
    found = [f"{name} is there again" for name in sorted(removed) if (root / name).exists()]
    for deed in done:
        if deed.what == "made" and ("removed", deed.name) not in begun:
            path = root / deed.name
            if not path.exists():
                found.append(f"{deed.name} is lost")
            elif hashlib.sha256(path.read_bytes()).digest() != deed.value:
                found.append(f"{deed.name} is wrong")
    return found + _faults_of_slots(root / "slots", deeds, position)


def _faults_of_slots(path: Path, deeds: list[Deed], position: int) -> list[str]:
    content = path.read_bytes() if path.exists() else b""
    oldest = Counter(deed.name for deed in deeds if deed.what == "slot" and deed.synced <= position)
    newest = Counter(deed.name for deed in deeds if deed.what == "slot" and deed.began < position)
    found = []
    for slot in range(SLOTS):
        allowed = range(oldest[str(slot)], newest[str(slot)] + 1)
        sector = content[slot * SLOT_BYTES :][:SLOT_BYTES]
        if sector not in [slot_content(slot, version) for version in allowed]:
            found.append(f"slot {slot} is not at {allowed.start} to {allowed.stop - 1}")
    return found


def _run(*command: object, accepted: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True
    )
    assert done.returncode in accepted, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@contextmanager
def _mounted(device: object, mount_point: Path, options: str) -> Iterator[Path]:
    mount_point.mkdir(exist_ok=True)
    _run("mount", "-t", "ext4", "-o", options, device, mount_point)
    try:
        yield mount_point
    finally:
        _run("umount", mount_point)


@contextmanager
def _looped(file: Path) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", file)
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


def _ext4_image(folder: Path) -> bytes:
    """Return a file system with some content, in blocks of which four are one of the engine's."""
    tree = folder / "tree"
    tree.mkdir()
    for number in range(8):
        (tree / f"known-{number}").write_bytes(Random(number).randbytes(200_000))
    (tree / "slots").write_bytes(b"".join(slot_content(slot, 0) for slot in range(SLOTS)))
    path = folder / "image"
    _run("mke2fs", "-q", "-t", "ext4", "-b", 1024, "-d", tree, path, f"{BASE_BYTES // 1024}k")
    return path.read_bytes()


@contextmanager
def _told(root: Path, bug: str = "") -> Iterator[Story]:
    """Run the workload, from the first write to the promoted disk."""
    server = RecordingServer(root)
    server.add_image(IMAGE, _ext4_image(root))
    disk = server.add_overlay(IMAGE, DISK_BYTES)
    try:
        server.serve(disk.name, bug)
        deeds = _play(server, disk, root)
    finally:
        server.close()
    recording = Recording(server.recording)
    try:
        yield Story(server, disk.name, recording, deeds)
    finally:
        recording.close()


def _play(server: RecordingServer, disk: Path, root: Path) -> list[Deed]:
    commands = [*(f"snapshot snapshot-{number}" for number in range(3)), "fill", "snapshot last"]
    commands.append("fill")
    with (
        _looped(disk) as device,
        _mounted(device, root / "guest", "data=ordered") as guest,
        ThreadPoolExecutor(1) as beside,
    ):
        workload = Workload(guest, server, Random(SEED))
        begun: list[Future[None]] = []
        try:
            for number, command in enumerate(commands, 2):
                while len(workload.deeds) < number * OPERATIONS_MIN // (len(commands) + 2):
                    workload.step()
                begun.append(beside.submit(server.command, command))
            while len(workload.deeds) < OPERATIONS_MIN or not all(one.done() for one in begun):
                workload.step()
            for one in begun:
                one.result()
        finally:
            workload.close()
    server.command("promote")
    return workload.deeds


def _cut(
    story: Story, folder: Path, position: int, random: Random, kept_part: float
) -> list[str]:  # fmt: skip
    """Cut the power, boot, read the disk through the engine, mount it; return what is wrong."""
    folder.mkdir()
    disks = DiskStore(folder / "state", folder / "run")
    directory = disks.overlay_directory(story.uuid)
    story.recording.replay(directory, position, random, kept_part)
    exported = folder / "exported"
    faults = _export(story, disks, exported)
    # replays the journal, as a mount does; whatever else needs repair is status 4
    _run("e2fsck", "-p", exported, accepted=(0, 1))
    _run("e2fsck", "-fn", exported)
    with _mounted(exported, folder / "mounted", "ro,loop") as mounted:
        faults += faults_of(mounted, story.deeds, position)
    rmtree(folder)
    return faults


def _export(story: Story, disks: DiskStore, path: Path) -> list[str]:
    if disks.form(story.uuid) == "raw":
        os.link(disks.data_path(story.uuid), path)
        return []
    faults = []
    files, layout = disks.files(story.uuid), disks.layout(story.uuid)
    layers = [(layout.top, layout.size_bytes), (layout.frozen, layout.frozen_size_bytes)]
    for name, size_bytes in layers:
        if name is not None and size_bytes is not None:
            layer = LayerFiles(
                story.uuid, files.data(name), files.bitmap(name), files.live(name), size_bytes
            )
            # blocks without a bit are what a cut leaves: they cost space only
            faults += [finding.message for finding in check_layer(layer, in_use=False)
                       if finding.code != "space-unreferenced"]  # fmt: skip
    chunks = ChunkStore(story.server.state_dir / "chunks")
    images = ImageStore(story.server.state_dir, chunks)

    async def copy() -> None:
        overlay = disks.open_overlay(story.uuid, images.reader)
        with path.open("wb") as file:
            for offset in range(0, overlay.size_bytes, MIB):
                file.write(await overlay.read(offset, MIB))
        await overlay.aclose()

    try:
        trio.run(copy)
    finally:
        chunks.close()
    return faults


def _cuts(story: Story, folder: Path, count: int) -> Iterator[tuple[int, list[str]]]:
    """Cut so often; yield how many steps had been synced before the cut, and what is wrong."""
    random, recording = Random(SEED), story.recording
    began = story.deeds[0].began
    synced = [deed.synced for deed in story.deeds]
    # what was promised first after a change of layers
    promises = [
        synced[index]
        for change in recording.changes
        if (index := bisect_left(synced, change)) < len(synced)
    ]
    # anywhere, and as often where few positions are, but delicate ones
    sorts = [
        [position for position in positions if position >= began]
        for positions in (recording.positions, recording.syncs, recording.changes, promises)
    ]
    for number in range(count):
        position = random.choice(sorts[number % len(sorts)])
        kept_part = random.choice([0.0, 0.3, 0.7, 1.0])
        faults = _cut(story, folder / f"cut-{number}", position, random, kept_part)
        yield sum(deed.synced <= position for deed in story.deeds), faults


def test_power_cut_loses_nothing_that_was_synced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the power is cut, ext4 is whole after its journal's replay and has what it synced."""
    durable = 0
    print(f"CRASH_SEED={SEED} CRASH_CUTS={CUTS}")
    with _told(tmp_path) as story:
        for number, (synced, faults) in enumerate(_cuts(story, tmp_path, CUTS)):
            assert faults == [], f"cut {number}"
            durable += synced
    with capsys.disabled():
        print(
            f"\n{CUTS} power cuts at {len(story.recording.positions)} positions, "
            f"{len(story.recording.changes)} of them changes of layers, "
            f"{len(story.recording.syncs)} ends of syncs; {len(story.deeds)} synced "
            f"steps, {durable} of them before a cut, summed, and all there"
        )
    assert durable > 0


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(
    bug: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """The same cuts find an engine that leaves out a sync or does things in the wrong order."""
    found = 0
    with (
        _told(tmp_path, bug) as story,
        pytest.raises((AssertionError, NotFound, NotVerified, OSError)),
    ):
        for _, faults in _cuts(story, tmp_path, PLANTED_MAX):
            found += 1
            assert faults == []
    with capsys.disabled():
        print(f"\n{bug}: found by cut {found + 1}")
    assert found < PLANTED_MAX
