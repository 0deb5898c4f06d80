"""A real FUSE mount of the tree over real stores, served by a process of its own.

python -m support.fuse_server STATE_DIR RUN_DIR MOUNT_POINT
"""

import logging
import os
import signal
import subprocess
import sys
import uuid as uuid_module
from datetime import UTC, datetime
from pathlib import Path

import pyfuse3
import trio

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.images import ImageStore
from stratocache.fs.blocks import Blocks
from stratocache.fs.disks import DiskStore
from stratocache.fs.state import Database, now
from stratocache.fs.tree import Tree
from support.images import store_image


class FuseServer:
    """A state directory with images and overlay disks, and a process that serves it."""

    def __init__(self, root: Path, *, opened_by_kernel: bool = False) -> None:
        self._options = ["opened-by-kernel"] if opened_by_kernel else []
        self.state_dir = root / "state"
        self.run_dir = root / "run"
        self.mount_point = root / "blocks"
        for directory in (self.state_dir, self.run_dir, self.mount_point):
            directory.mkdir()
        self.disks = DiskStore(self.state_dir, self.run_dir)
        self._db = Database(self.state_dir / "state.db")
        self._db.migrate()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = root / "server.log"
        self._log.touch()

    @property
    def images(self) -> Path:
        """The directory of images."""
        return self.mount_point / "images"

    @property
    def overlays(self) -> Path:
        """The directory of overlay disks."""
        return self.mount_point / "disks"

    def add_image(self, image_id: str, content: bytes) -> Path:
        """Store an image while nobody serves; return its path in the tree."""
        chunks = ChunkStore(self.state_dir / "chunks")
        store_image(ImageStore(self.state_dir, chunks), image_id, content)
        chunks.close()
        self.add_image_row(image_id, len(content))
        return self.images / image_id

    def add_image_row(self, image_id: str, size_bytes: int) -> None:
        """Say in the state database that there is an image."""
        entry = Entry(
            catalogue="test",
            identifier=image_id,
            size_bytes=size_bytes,
            digests={},
            locations=(),
            endorser=Endorser(email="a@example.org", subject="", issuer=""),
            endorsed_at=datetime.now(UTC),
            trust="unsigned",
        )
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO images (id, state, size_bytes, sha256, entry, created_at) "
                "VALUES (?, 'verified', ?, '', ?, ?)",
                (image_id, size_bytes, entry.model_dump_json(), now()),
            )

    def remove_image_row(self, image_id: str) -> None:
        """Say in the state database that an image is gone."""
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM images WHERE id = ?", (image_id,))

    def add_overlay(self, image_id: str, size_bytes: int) -> Path:
        """Make an overlay disk over an image; return its path in the tree."""
        uuid = str(uuid_module.uuid4())
        # size alone counts here: the server opens the image itself
        assert self.disks.create_clone(uuid, size_bytes, _NoChunks(), image_id) == "overlay"
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO disks (uuid, state, size_bytes, base_image, base_manifest, form, "
                "owner, visibility, kind, volatile, created_at) "
                "VALUES (?, 'available', ?, ?, ?, 'overlay', 'root', 'private', 'machine', 0, ?)",
                (uuid, size_bytes, image_id, image_id, now()),
            )
        return self.overlays / uuid

    def start(self) -> None:
        """Mount and serve."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    self.state_dir,
                    self.run_dir,
                    self.mount_point,
                    *self._options,
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(self.log())

    def stop(self) -> None:
        """End the server, which unmounts."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the server, and unmount what it left."""
        self._end(signal.SIGKILL)
        subprocess.run(["fusermount3", "-u", self.mount_point], check=True)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=30)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    @property
    def running(self) -> bool:
        """Whether the server has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return what the server logged, all starts together."""
        return self._log.read_text()

    def close(self) -> None:
        """Stop serving, and leave nothing mounted even when the server has crashed."""
        self._end(signal.SIGTERM)
        if os.path.ismount(self.mount_point):
            subprocess.run(["fusermount3", "-uz", self.mount_point], check=True)
        self._db.close()


class _NoChunks:
    size_bytes = 0

    def open_chunk(self, index: int) -> int | None:
        """Never called for an overlay."""
        raise AssertionError(index)


def _serve(state_dir: Path, run_dir: Path, mount_point: Path, *, opened_by_kernel: bool) -> None:
    chunks = ChunkStore(state_dir / "chunks")
    db = Database(state_dir / "state.db")
    blocks = Blocks(
        Configuration(state_dir=state_dir, run_dir=run_dir),
        db,
        ImageStore(state_dir, chunks),
        DiskStore(state_dir, run_dir),
    )
    tree = Tree(blocks, opened_by_kernel=opened_by_kernel)
    pyfuse3.init(tree, str(mount_point), {*pyfuse3.default_options, "fsname=stratocache"})

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                print("ready", flush=True)
                async for _ in signals:
                    nursery.cancel_scope.cancel()
        await blocks.aclose()

    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)
        chunks.close()
        db.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    _serve(
        *(Path(argument) for argument in sys.argv[1:4]),
        opened_by_kernel="opened-by-kernel" in sys.argv[4:],
    )
