"""Disk directories: made whole or not at all, removed without a trace, shared extents on XFS."""

import os
import shutil
import subprocess
import time
import uuid as uuid_module
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import trio
from support.images import store_image

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.errors import InvalidInput, NoSpace, NotFound, NotVerified
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.fs.clones import Clone
from stratocache.fs.disks import DiskStore

MIB = 1024**2
IMAGE = "I" * 27


def new_uuid() -> str:
    """Return a UUID as the state database makes them."""
    return str(uuid_module.uuid4())


class Importer:
    """Puts images into chunk stores, and closes the stores."""

    def __init__(self) -> None:
        self._stores: list[ChunkStore] = []

    def __call__(self, state_dir: Path, content: bytes) -> ImageReader:
        """Return the reader of an image in a new chunk store."""
        chunks = ChunkStore(state_dir / "chunks")
        self._stores.append(chunks)
        images = ImageStore(state_dir, chunks)
        store_image(images, IMAGE, content)
        return images.reader(IMAGE)

    def close(self) -> None:
        """Close all stores."""
        while self._stores:
            self._stores.pop().close()


@pytest.fixture
def import_image() -> Iterator[Importer]:
    """Imports images for one test."""
    importer = Importer()
    yield importer
    importer.close()


def image_content(size: int) -> bytes:
    """Return bytes in which the second chunk is all zeros."""
    content = bytearray(Random(5).randbytes(size))
    content[CHUNK_BYTES : 2 * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    return bytes(content)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory on the default file system."""
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def store(state_dir: Path, tmp_path: Path) -> DiskStore:
    """A disk store below it."""
    return DiskStore(state_dir, tmp_path / "run")


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small XFS file system with reflinks, on a loop device that goes when it is unmounted."""
    root = tmp_path_factory.mktemp("xfs")
    backing, directory = root / "xfs.img", root / "mounted"
    directory.mkdir()
    with backing.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", backing], check=True)
    subprocess.run(["mount", "-o", "loop", backing, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
        backing.unlink()


@pytest.fixture
def xfs_state(xfs: Path) -> Path:
    """A fresh state directory on XFS."""
    directory = xfs / new_uuid()
    directory.mkdir()
    return directory


def test_blank_disk_is_a_sparse_file(store: DiskStore) -> None:
    """A blank disk is raw, has its size, reads zeros and takes no space."""
    uuid = new_uuid()
    assert store.create_blank(uuid, 10 * 1024 * MIB + 5) == "raw"
    assert store.data_path(uuid).stat().st_size == 10 * 1024 * MIB + 5
    assert store.allocated_bytes(uuid) == 0
    assert store.data_path(uuid).stat().st_mode & 0o777 == 0o600
    assert store.overlay_directory(uuid).stat().st_mode & 0o777 == 0o700


def test_create_again_changes_nothing(store: DiskStore) -> None:
    """Creating a disk that is there keeps what was written to it."""
    uuid = new_uuid()
    store.create_blank(uuid, MIB)
    store.data_path(uuid).write_bytes(b"written".ljust(MIB, b"\0"))
    assert store.create_blank(uuid, MIB) == "raw"
    assert store.data_path(uuid).read_bytes().startswith(b"written")


@pytest.mark.parametrize("leftover", ["empty", "data", "whole"])
def test_create_after_a_crash_in_the_stage(
    store: DiskStore, state_dir: Path, leftover: str
) -> None:
    """Whatever a crash left in the stage, creating again makes the disk and empties the stage."""
    uuid = new_uuid()
    staged = state_dir / "stage" / f"disk-{uuid}"
    staged.mkdir()
    if leftover != "empty":
        (staged / "data").write_bytes(b"half")
    if leftover == "whole":
        (staged / "bitmap").write_bytes(b"half")
    store.create_blank(uuid, MIB)
    assert os.listdir(store.overlay_directory(uuid)) == ["data"]
    assert store.data_path(uuid).stat().st_size == MIB
    assert os.listdir(state_dir / "stage") == []


def test_clone_on_the_default_file_system_is_an_overlay(
    store: DiskStore, state_dir: Path, import_image: Importer
) -> None:
    """Without reflinks a clone is an overlay over the image, larger than it if asked."""
    assert not store.reflink_supported()
    content = image_content(3 * CHUNK_BYTES + 12345)
    reader = import_image(state_dir, content)
    uuid, size = new_uuid(), len(content) + MIB + 1
    assert store.create_clone(uuid, size, reader, IMAGE) == "overlay"
    assert store.create_clone(uuid, size, reader, IMAGE) == "overlay"
    assert store.layout(uuid).base == IMAGE
    assert store.allocated_bytes(uuid) < 64 * 1024
    overlay = store.open_overlay(uuid, lambda name: reader)
    trio.run(overlay.write, len(content) - 3, b"across the end")
    expected = bytearray(content.ljust(size, b"\0"))
    expected[len(content) - 3 : len(content) + 11] = b"across the end"
    assert bytes(trio.run(overlay.read, 0, size)) == expected
    trio.run(overlay.aclose)


def test_clone_smaller_than_its_image_is_refused(
    store: DiskStore, state_dir: Path, import_image: Importer
) -> None:
    """A disk that would cut its image is refused and leaves nothing behind."""
    reader = import_image(state_dir, b"x" * 5000)
    uuid = new_uuid()
    with pytest.raises(InvalidInput) as caught:
        store.create_clone(uuid, 4999, reader, IMAGE)
    assert caught.value.code == "disk-too-small"
    assert store.form(uuid) is None
    assert os.listdir(state_dir / "stage") == []


def test_delete_leaves_nothing(
    store: DiskStore, state_dir: Path, tmp_path: Path, import_image: Importer
) -> None:
    """Deleting an overlay removes its files and its live bitmap; deleting again is no error."""
    reader = import_image(state_dir, b"x" * 5000)
    uuid = new_uuid()
    store.create_clone(uuid, 5000, reader, IMAGE)
    store.open_overlay(uuid, lambda name: reader).close()
    assert os.listdir(tmp_path / "run/live") == [f"{uuid}.1.bitmap"]
    store.delete(uuid)
    store.delete(uuid)
    for directory in (tmp_path / "run/live", state_dir / "disks", state_dir / "stage"):
        assert os.listdir(directory) == []
    with pytest.raises(NotFound):
        store.open_overlay(uuid, lambda name: reader)


def test_sweep_removes_what_nobody_owns(store: DiskStore, state_dir: Path, tmp_path: Path) -> None:
    """A sweep removes disks, stages and live bitmaps of unknown UUIDs, and nothing else."""
    kept, unknown, staged, live = (new_uuid() for _ in range(4))
    store.create_blank(kept, MIB)
    store.create_blank(unknown, MIB)
    (state_dir / "stage" / f"disk-{staged}").mkdir()
    (state_dir / "stage" / "fetch-of-others").mkdir()
    (state_dir / "disks" / "lost+found").mkdir()
    (tmp_path / "run/live" / f"{live}.1.bitmap").touch()
    (tmp_path / "run/live" / f"{live}.bitmap.new").touch()
    (tmp_path / "run/live" / f"{kept}.2.bitmap").touch()
    assert store.sweep({kept}) == sorted([unknown, staged, live])
    assert set(os.listdir(state_dir / "disks")) == {kept, "lost+found"}
    assert os.listdir(state_dir / "stage") == ["fetch-of-others"]
    assert os.listdir(tmp_path / "run/live") == [f"{kept}.2.bitmap"]


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc", "A" * 36, f"{uuid_module.UUID(int=1)}/..", "x" * 10_000]
)
def test_name_that_is_no_uuid_is_refused(store: DiskStore, name: str) -> None:
    """Nothing but a UUID becomes a path."""
    for call in (store.form, store.delete, store.data_path, store.layout, store.freeze_raw):
        with pytest.raises(InvalidInput) as caught:
            call(name)
        assert caught.value.code == "uuid-invalid"


def test_many_blank_disks_at_once(store: DiskStore, state_dir: Path) -> None:
    """Disks made in parallel threads are all there."""
    uuids = [new_uuid() for _ in range(40)]
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(store.create_blank, uuids, [MIB] * 40)) == {"raw"}
    assert set(os.listdir(state_dir / "disks")) == set(uuids)


@pytest.mark.root
def test_reflinked_clone_shares_the_chunks_extents(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """On XFS a clone is raw, holds the image, and takes next to no space until it is written."""
    content = image_content(64 * MIB + 4096 + 77)
    reader = import_image(xfs_state, content)
    store = DiskStore(xfs_state, tmp_path / "run")
    assert store.reflink_supported()
    free_before = _free_bytes(xfs_state)
    size = 96 * MIB + 1
    uuids = [new_uuid() for _ in range(4)]
    for uuid in uuids:
        assert store.create_clone(uuid, size, reader, IMAGE) == "raw"
    assert free_before - _free_bytes(xfs_state) < 2 * MIB
    assert "shared" in _extents(store.data_path(uuids[0]))
    assert store.data_path(uuids[0]).read_bytes() == content.ljust(size, b"\0")

    with store.data_path(uuids[0]).open("r+b") as disk:
        disk.write(b"one clone's own")
    assert store.data_path(uuids[1]).read_bytes() == content.ljust(size, b"\0")
    assert reader.read_blocking(0, len(content)) == content


@pytest.mark.root
def test_clone_of_an_incomplete_image_is_an_overlay(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """Where extents can be shared, a clone of what is not all here needs no chunk to be made."""
    reader = import_image(xfs_state, image_content(3 * CHUNK_BYTES))
    store = DiskStore(xfs_state, tmp_path / "run")
    chunk = reader.chunk_path(0)
    assert chunk is not None
    chunk.unlink()

    uuid = new_uuid()

    assert store.create_clone(uuid, reader.size_bytes, reader, IMAGE, complete=False) == "overlay"
    assert store.form(uuid) == "overlay"


def test_clones_made_together_fail_singly(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """Of clones that are made at once each is whole or absent, and those there stay as they are."""
    reader = import_image(xfs_state, image_content(3 * CHUNK_BYTES))
    store = DiskStore(xfs_state, tmp_path / "run")
    there, small, *fresh = (new_uuid() for _ in range(5))
    store.create_blank(there, 5)

    wanted = [(there, 5 * MIB), *((uuid, 9 * MIB) for uuid in fresh), (small, MIB)]
    forms, failures = store.create_clones([Clone(uuid, size, reader) for uuid, size in wanted])

    assert forms == dict.fromkeys((there, *fresh), "raw")
    assert [(uuid, type(error)) for uuid, error in failures.items()] == [(small, InvalidInput)]
    assert store.data_path(there).read_bytes() == bytes(5)
    for uuid in fresh:
        data = store.data_path(uuid).read_bytes()
        assert data == image_content(3 * CHUNK_BYTES).ljust(9 * MIB, b"\0")
    assert store.form(small) is None
    assert list((xfs_state / "stage").iterdir()) == []


@pytest.mark.root
def test_raw_snapshots_share_extents_and_are_independent(xfs_state: Path, tmp_path: Path) -> None:
    """Snapshots take no space, survive one another, and can be cloned and gone back to."""
    store = DiskStore(xfs_state, tmp_path / "run")
    uuid, clone, size = new_uuid(), new_uuid(), 32 * MIB
    store.create_blank(uuid, size)
    first = Random(1).randbytes(size)
    store.data_path(uuid).write_bytes(first)
    store.snapshot_raw(uuid, "first")
    store.snapshot_raw(uuid, "first")
    free_before = _free_bytes(xfs_state)
    with store.data_path(uuid).open("r+b") as disk:
        disk.write(b"second")
    store.snapshot_raw(uuid, "second")
    store.grow_raw(uuid, size + MIB)
    assert free_before - _free_bytes(xfs_state) < 2 * MIB
    assert store.clone_raw_snapshot(clone, size + 1, uuid, "second") == "raw"
    assert store.data_path(clone).read_bytes() == b"second" + first[6:] + b"\0"
    store.delete_raw_snapshot(uuid, "second")
    store.delete_raw_snapshot(uuid, "second")
    store.rollback_raw(uuid, "first")
    assert store.data_path(uuid).read_bytes() == first
    assert sorted(os.listdir(store.overlay_directory(uuid))) == ["data", "snapshots"]
    assert store.form(uuid) == "raw"
    with pytest.raises(NotFound):
        store.clone_raw_snapshot(new_uuid(), size, uuid, "second")
    with pytest.raises(InvalidInput):
        store.snapshot_raw(uuid, "../escape")
    with pytest.raises(InvalidInput):
        store.clone_raw_snapshot(new_uuid(), size - 1, uuid, "first")


@pytest.mark.root
def test_promotion_shares_the_chunks_extents(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """On XFS an overlay becomes raw with next to no space, and keeps its own blocks."""
    content = image_content(16 * MIB + 4096 + 77)
    reader = import_image(xfs_state, content)
    store = DiskStore(xfs_state, tmp_path / "run")
    store._reflinks = False
    uuid, size = new_uuid(), 24 * MIB + 1
    assert store.create_clone(uuid, size, reader, IMAGE) == "overlay"
    overlay = store.open_overlay(uuid, lambda name: reader)
    trio.run(overlay.write, 5 * MIB + 3, b"own")
    free_before = _free_bytes(xfs_state)
    done: list[int] = []

    async def fill() -> None:
        await overlay.fill(done.append, reflink=True)
        await overlay.aclose()

    trio.run(fill)
    store.finish_promotion(uuid)
    assert free_before - _free_bytes(xfs_state) < 2 * MIB
    expected = bytearray(content.ljust(size, b"\0"))
    expected[5 * MIB + 3 : 5 * MIB + 6] = b"own"
    assert store.data_path(uuid).read_bytes() == expected
    assert done[-1] == size
    assert store.form(uuid) == "raw"
    assert reader.read_blocking(0, len(content)) == content


def test_raw_disk_grows_and_does_not_shrink(store: DiskStore) -> None:
    """A raw disk gets longer by zeros; less than it has is refused."""
    uuid = new_uuid()
    store.create_blank(uuid, MIB)
    store.grow_raw(uuid, MIB)
    store.grow_raw(uuid, MIB + 5)
    assert store.data_path(uuid).stat().st_size == MIB + 5
    with pytest.raises(InvalidInput) as caught:
        store.grow_raw(uuid, MIB)
    assert caught.value.code == "disk-shrinks"
    with pytest.raises(NotFound):
        store.grow_raw(new_uuid(), MIB)


def test_snapshot_rollback_and_adoption_without_reflinks(
    store: DiskStore, state_dir: Path, import_image: Importer
) -> None:
    """A raw disk is frozen as a file, becomes an overlay over its snapshot, and can go back."""
    uuid = new_uuid()
    content = image_content(3 * CHUNK_BYTES)
    store.create_blank(uuid, len(content))
    store.data_path(uuid).write_bytes(content)
    store.freeze_raw(uuid)
    store.freeze_raw(uuid)
    assert store.form(uuid) == "overlay"
    reader = import_image(state_dir, content)
    overlay = store.open_overlay(uuid, lambda name: reader)

    async def snapshot() -> None:
        assert overlay.frozen is not None
        assert list(overlay.frozen.chunks()) in ([0, 2], [0, 1, 2])
        await overlay.rebase(reader, IMAGE)
        await overlay.write(0, b"forget")
        await overlay.aclose()

    trio.run(snapshot)
    assert sorted(os.listdir(store.overlay_directory(uuid))) == [
        "1.bitmap", "1.data", "layout.json",
    ]  # fmt: skip
    store.rollback_overlay(uuid, IMAGE, len(content))
    overlay = store.open_overlay(uuid, lambda name: reader)
    assert trio.run(overlay.read, 0, len(content)) == content
    overlay.close()
    store.adopt_overlay(uuid, "other")
    assert store.layout(uuid).base == IMAGE


@pytest.mark.root
def test_space_of_a_deleted_image_is_freed(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """After the chunks, the clones and the image are forgotten, their space is free again."""
    store = DiskStore(xfs_state, tmp_path / "run")
    free_before = _free_bytes(xfs_state)
    reader = import_image(xfs_state, image_content(64 * MIB))
    uuid = new_uuid()
    store.create_clone(uuid, 64 * MIB, reader, IMAGE)
    import_image.close()
    shutil.rmtree(xfs_state / "chunks")
    store.delete(uuid)
    assert free_before - _free_bytes(xfs_state) > 60 * MIB
    store.forget_image(reader)
    # XFS frees the extents of a deleted file in the background
    deadline = time.monotonic() + 10
    while free_before - _free_bytes(xfs_state) > 2 * MIB and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free_before - _free_bytes(xfs_state) < 2 * MIB


@pytest.mark.root
def test_damaged_chunk_makes_no_clone(
    xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """A clone by reflink of an image with a wrong chunk fails and leaves nothing behind."""
    content = image_content(4 * CHUNK_BYTES)
    reader = import_image(xfs_state, content)
    path = reader.chunk_path(3)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"wrong")
    store = DiskStore(xfs_state, tmp_path / "run")
    uuid = new_uuid()
    with pytest.raises(NotVerified):
        store.create_clone(uuid, len(content), reader, IMAGE)
    assert store.form(uuid) is None
    assert os.listdir(xfs_state / "stage") == []


@pytest.mark.root
def test_full_file_system_makes_no_disk(
    xfs: Path, xfs_state: Path, tmp_path: Path, import_image: Importer
) -> None:
    """A disk that does not fit is `no-space`, and nothing of it stays."""
    store = DiskStore(xfs_state, tmp_path / "run")
    reader = import_image(xfs_state, b"x" * 5000)
    store._reflinks = False
    uuid = new_uuid()
    with pytest.raises(NoSpace):
        store.create_clone(uuid, 64 * 1024**4, reader, IMAGE)
    assert store.form(uuid) is None
    assert os.listdir(xfs_state / "stage") == []


def _free_bytes(directory: Path) -> int:
    os.sync()
    status = os.statvfs(directory)
    return status.f_bfree * status.f_frsize


def _extents(path: Path) -> str:
    found = subprocess.run(["filefrag", "-v", path], check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout
