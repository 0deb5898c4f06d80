"""A FUSE server of one overlay disk whose files are recorded, told what to do on standard input.

python -m support.recording_server STATE_DIR RUN_DIR MOUNT_POINT UUID LOG [BUG]

With the name of a bug (`BUGS`) the engine has it. One command a line: `snapshot ID` freezes and absorbs, `fill` brings all blocks to the top layer,
`promote` makes the disk, which nobody may use any more, raw. Each answers `done`.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.images import ImageStore
from stratocache.fs.blocks import Blocks
from stratocache.fs.disks import DiskStore
from stratocache.fs.layers import DiskFiles
from stratocache.fs.overlay import Overlay
from stratocache.fs.stack import FrozenLayer, Layer
from stratocache.fs.state import Database
from stratocache.fs.tree import Tree
from support.fuse_server import FuseServer
from support.recorder import RecordingStorage


class RecordingServer(FuseServer):
    """A `FuseServer` of one overlay that records and takes commands."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.recording = root / "recording"

    def serve(self, uuid: str, bug: str = "") -> None:
        """Mount and serve, with an engine that has a bug if one is named."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.state_dir, self.run_dir, self.mount_point,
                 uuid, self.recording, bug],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self._expect("ready")

    def command(self, line: str) -> None:
        """Send one command and wait for its end."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        self._expect("done")

    def _expect(self, answer: str) -> None:
        assert self._process is not None and self._process.stdout is not None
        if self._process.stdout.readline().decode() != f"{answer}\n":
            raise RuntimeError(self.log())

    def position(self) -> int:
        """Return how much has been recorded: everything that was acknowledged is in it."""
        return self.recording.stat().st_size

    def close(self) -> None:
        """Stop serving."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        super().close()


class _RecordedDisks(DiskStore):
    """A `DiskStore` whose disks' files are recorded."""

    def __init__(self, state_dir: Path, run_dir: Path, storage: RecordingStorage) -> None:
        super().__init__(state_dir, run_dir)
        self._storage = storage

    def files(self, uuid: str) -> DiskFiles:
        """Return the names of a disk's files, on the recording storage."""
        plain = super().files(uuid)
        return DiskFiles(plain.directory, plain.live("1").with_name(uuid), self._storage)


class _Commands:
    """What can be done with the one disk while it is served."""

    def __init__(self, uuid: str, blocks: Blocks, images: ImageStore, disks: DiskStore) -> None:
        disk = blocks.disk_by_uuid(uuid)
        assert disk is not None
        self._disk = disk
        self._blocks = blocks
        self._images = images
        self._disks = disks

    async def perform(self, command: str, *arguments: str) -> None:
        """Do one command."""
        overlay = await self._blocks.open_overlay(self._disk.number)
        if command == "snapshot":
            await overlay.freeze()
            assert overlay.frozen is not None
            await trio.to_thread.run_sync(self._publish, arguments[0], overlay.frozen)
            reader = await trio.to_thread.run_sync(self._images.reader, arguments[0])
            await overlay.rebase(reader, arguments[0])
        elif command == "fill":
            await overlay.fill(lambda done_bytes: None, reflink=False)
        else:
            assert command == "promote"
            async with self._blocks.closed(self._disk.number, flush=True):
                await trio.to_thread.run_sync(self._disks.finish_promotion, self._disk.uuid)

    def _publish(self, name: str, frozen: FrozenLayer) -> None:
        draft = self._images.begin()
        for index in range(-(-frozen.size_bytes // CHUNK_BYTES)):
            draft.add([frozen.read_chunk(index)])
        self._images.publish(name, draft.manifest())
        self._images.finish(draft)


def _serve(state_dir: Path, run_dir: Path, mount_point: Path, uuid: str, log: Path) -> None:
    chunks = ChunkStore(state_dir / "chunks")
    images = ImageStore(state_dir, chunks)
    db = Database(state_dir / "state.db")
    storage = RecordingStorage(state_dir / "disks" / uuid, log)
    disks = _RecordedDisks(state_dir, run_dir, storage)
    blocks = Blocks(Configuration(state_dir=state_dir, run_dir=run_dir), db, images, disks)
    commands = _Commands(uuid, blocks, images, disks)
    pyfuse3.init(Tree(blocks), str(mount_point), {*pyfuse3.default_options, "fsname=stratocache"})

    async def obey() -> None:
        pending = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stream:
            async for part in stream:
                pending += part
                while b"\n" in pending:
                    line, _, pending = pending.partition(b"\n")
                    await commands.perform(*line.decode().split())
                    print("done", flush=True)

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            nursery.start_soon(obey)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                print("ready", flush=True)
                async for _ in signals:
                    nursery.cancel_scope.cancel()

    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)
        chunks.close()
        db.close()


def _bitmap_first() -> None:
    def sync(layer: Layer, pages: dict[int, bytes]) -> None:
        layer.bitmap.write(layer._durable, pages)
        layer.data.fdatasync()

    Layer._sync = sync  # type: ignore[method-assign, assignment]


def _no_data_sync() -> None:
    def sync(layer: Layer, pages: dict[int, bytes]) -> None:
        layer.bitmap.write(layer._durable, pages)

    Layer._sync = sync  # type: ignore[method-assign, assignment]


def _frozen_unsynced() -> None:
    async def flush(overlay: Overlay) -> None:
        await overlay._top.flush()

    Overlay._flush_layers = flush  # type: ignore[method-assign, assignment]


def _names_unsynced() -> None:
    def sync(storage: RecordingStorage, directory: Path) -> None:
        pass

    RecordingStorage.sync_directory = sync  # type: ignore[method-assign, assignment]


BUGS: dict[str, Callable[[], None]] = {
    "bitmap-first": _bitmap_first,
    "no-data-sync": _no_data_sync,
    "frozen-unsynced": _frozen_unsynced,
    "names-unsynced": _names_unsynced,
}
"""Each plants one bug into the engine, or into the storage, of this process."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    state, run, mount, disk_uuid, recording, planted = sys.argv[1:7]
    if planted:
        BUGS[planted]()
    _serve(Path(state), Path(run), Path(mount), disk_uuid, Path(recording))
