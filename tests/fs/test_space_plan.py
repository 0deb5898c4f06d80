"""The account of space against real files, and how much may be promised."""

import os
import subprocess
import tempfile
import uuid as uuid_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from support.api_daemon import IMAGE_ID, insert_image
from support.appliance import Appliance, small_filesystem
from support.images import store_image

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.errors import NoSpace
from stratocache.cache.images import ImageStore
from stratocache.fs import disk_check, space_plan
from stratocache.fs.disks import DiskStore
from stratocache.fs.state import Database, now

MIB = 1024**2
TIB = 1024**4


class Site:
    """A state directory with a database and disks."""

    def __init__(self, state_dir: Path, run_dir: Path, *, ratio: float, reserve_bytes: int) -> None:
        self.configuration = Configuration(
            state_dir=state_dir,
            run_dir=run_dir,
            space=SpaceSettings(reserve_bytes=reserve_bytes, overcommit_ratio=ratio),
        )
        self.db = Database(self.configuration.database)
        self.db.migrate()
        self.store = DiskStore(state_dir, run_dir)

    def row(self, size_bytes: int, state: str = "available", form: str | None = "raw") -> str:
        """Insert a disk without files; return its UUID."""
        uuid = str(uuid_module.uuid4())
        self.db.connection.execute(
            "INSERT INTO disks (uuid, state, size_bytes, form, owner, visibility, kind, volatile, "
            "created_at) VALUES (?, ?, ?, ?, 'root', 'private', 'data', 0, ?)",
            (uuid, state, size_bytes, form, now()),
        )
        return uuid

    def disk(self, size_bytes: int, written_bytes: int = 0) -> str:
        """Make a raw disk with some bytes in it."""
        uuid = self.row(size_bytes)
        self.store.create_blank(uuid, size_bytes)
        with self.store.data_path(uuid).open("r+b") as file:
            file.write(b"x" * written_bytes)
            os.fsync(file.fileno())
        return uuid

    def account(self) -> space_plan.SpaceAccount:
        """Return the account."""
        return space_plan.account(self.configuration, self.db)

    def admit(self, uuid: str, size_bytes: int) -> None:
        """Ask whether a disk may be made."""
        space_plan.admit(self.configuration, self.db, uuid, size_bytes)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site on the default file system, where 10 times what is available may be promised."""
    (tmp_path / "state").mkdir()
    made = Site(tmp_path / "state", tmp_path / "run", ratio=10, reserve_bytes=MIB)
    yield made
    made.db.close()


def test_account_counts_every_kind(site: Site) -> None:
    """Each kind is what its files take; disks are promised what they do not have."""
    site.disk(100 * MIB, 3 * MIB)
    site.disk(50 * MIB)
    state_dir = site.configuration.state_dir
    for name in ("stage/IMAGE", "quarantine", "manifests"):
        (state_dir / name).mkdir(parents=True, exist_ok=True)
        (state_dir / name / "file").write_bytes(b"x" * MIB)
    content = Random(1).randbytes(3 * CHUNK_BYTES)
    chunks = ChunkStore(state_dir / "chunks")
    store_image(ImageStore(state_dir, chunks), "I", content)
    open_account = site.account()
    chunks.close()
    account = site.account()
    assert open_account.chunk_bytes == account.chunk_bytes == len(content)
    assert (account.stage_bytes, account.quarantine_bytes) == (MIB, MIB)
    assert MIB < account.manifest_bytes < MIB + 64 * 1024
    assert 3 * MIB <= account.disk_allocated_bytes < 4 * MIB
    assert account.disk_size_bytes == 150 * MIB
    assert account.promised_bytes == 150 * MIB - account.disk_allocated_bytes
    assert account.available_bytes == account.free_bytes - MIB
    assert account.promise_limit_bytes == 10 * account.available_bytes
    assert account.free_bytes < account.total_bytes


def test_snapshots_make_a_disk_owe_all_of_itself(site: Site) -> None:
    """A disk that shares its extents with a snapshot may have to be given all of it anew."""
    uuid = site.disk(100 * MIB, 3 * MIB)
    folder = site.store.overlay_directory(uuid) / "snapshots"
    folder.mkdir()
    (folder / "one").write_bytes(b"x" * 3 * MIB)
    account = site.account()
    assert account.promised_bytes == 100 * MIB
    assert account.disk_allocated_bytes >= 6 * MIB


def test_rows_without_files_are_promised_in_full(site: Site) -> None:
    """A disk that is being made, or whose files are gone, has nothing yet."""
    site.row(7 * MIB, "creating", None)
    assert site.account().promised_bytes == 7 * MIB


def test_overcommit_is_refused_with_numbers(site: Site) -> None:
    """Up to the limit disks are admitted; beyond it the refusal says what is promised and there."""
    available_bytes = site.account().available_bytes
    first = site.row(5 * available_bytes, "creating", None)
    site.admit(first, 5 * available_bytes)
    second = site.row(6 * available_bytes, "creating", None)
    with pytest.raises(NoSpace) as caught:
        site.admit(second, 6 * available_bytes)
    assert caught.value.code == "overcommit"
    assert caught.value.field == "size_bytes"
    assert str(5 * available_bytes) in caught.value.message
    assert str(6 * available_bytes) in caught.value.message
    assert "space.overcommit_ratio" in caught.value.message
    site.admit(first, 5 * available_bytes)
    site.db.connection.execute("UPDATE disks SET state = 'deleting' WHERE uuid = ?", (first,))
    site.admit(second, 6 * available_bytes)


def test_what_disks_have_is_not_promised_again(site: Site) -> None:
    """Bytes that disks own count against nothing: the exact account decides near the limit."""
    uuid = site.disk(64 * MIB, 64 * MIB)
    available_bytes = site.account().available_bytes
    new = site.row(10 * available_bytes, "creating", None)
    # the sum of all sizes is over the limit by 64 MiB, of which nothing is still to be given
    site.admit(new, 10 * available_bytes - 32 * MIB)
    site.store.delete(uuid)
    with pytest.raises(NoSpace):
        site.admit(new, 10 * site.account().available_bytes)


def test_growth_is_admitted_like_a_new_disk(site: Site) -> None:
    """A disk that is to grow counts with its new size only."""
    uuid = site.disk(64 * MIB)
    site.admit(uuid, 128 * MIB)
    with pytest.raises(NoSpace) as caught:
        site.admit(uuid, 2**60)
    assert caught.value.code == "overcommit"


@pytest.mark.root
def test_reserve_is_left_alone(tmp_path: Path) -> None:
    """When free space has fallen below the reserve nothing new is made, however small."""
    with small_filesystem(tmp_path / "small", 64 * MIB) as small:
        site = Site(small, tmp_path / "run", ratio=1000, reserve_bytes=48 * MIB)
        uuid = site.row(MIB, "creating", None)
        site.admit(uuid, MIB)
        (small / "filler").write_bytes(bytes(20 * MIB))
        with pytest.raises(NoSpace) as caught:
            site.admit(uuid, MIB)
        assert caught.value.code == "no-space"
        assert site.account().available_bytes == 0
        site.db.close()


def test_holders_of_images_are_named(site: Site) -> None:
    """Overlays, attachments and pins keep an image; raw clones do not."""
    insert_image(site.db)
    insert_image(site.db, "B" * 27)
    raw, overlay = site.row(MIB), site.row(MIB, form="overlay")
    site.db.connection.execute("UPDATE disks SET base_image = ?", (IMAGE_ID,))
    site.db.connection.execute("UPDATE images SET last_used_at = ? WHERE id = ?", (now(), IMAGE_ID))
    unused, used = space_plan.holdings(site.db)
    assert (unused.image.id, unused.held, unused.disks) == ("B" * 27, False, ())
    assert [disk.uuid for disk in used.disks] == [overlay]
    assert used.held
    assert raw not in [disk.uuid for disk in used.disks]
    site.db.connection.execute("UPDATE images SET pinned = 1")
    assert all(item.held for item in space_plan.holdings(site.db))


@dataclass
class SmallXfs:
    """A small XFS on a loop device, and the site and images on it."""

    directory: Path
    site: Site
    images: ImageStore


@pytest.fixture
def small_xfs(tmp_path: Path) -> Iterator[SmallXfs]:
    """A small XFS on a loop device; the rows are elsewhere, so that they can be written always."""
    backing, directory = tmp_path / "xfs.img", tmp_path / "mounted"
    directory.mkdir()
    with backing.open("wb") as file:
        file.truncate(320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", backing], check=True)
    subprocess.run(["mount", "-o", "loop", backing, directory], check=True)
    try:
        (directory / "state.db").symlink_to(tmp_path / "state.db")
        site = Site(directory, tmp_path / "run", ratio=10, reserve_bytes=0)
        chunks = ChunkStore(directory / "chunks")
        try:
            yield SmallXfs(directory, site, ImageStore(directory, chunks))
        finally:
            chunks.close()
            site.db.close()
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.root
def test_shared_extents_are_promised(small_xfs: SmallXfs) -> None:
    """A clone by reflink has extents, but all of them may have to be given anew."""
    site, images = small_xfs.site, small_xfs.images
    content = Random(1).randbytes(8 * MIB)
    store_image(images, IMAGE_ID, content)
    insert_image(site.db)
    site.db.connection.execute("UPDATE images SET size_bytes = ?", (len(content),))
    uuid = site.row(16 * MIB)
    site.db.connection.execute("UPDATE disks SET base_image = ?", (IMAGE_ID,))
    reader = images.reader(IMAGE_ID)
    assert site.store.create_clone(uuid, 16 * MIB, reader, IMAGE_ID) == "raw"
    site.store.forget_image(reader)
    account = site.account()
    assert account.disk_allocated_bytes >= 8 * MIB
    assert account.promised_bytes == 16 * MIB


@pytest.mark.root
def test_disk_full_at_any_moment_leaves_nothing(small_xfs: SmallXfs) -> None:
    """Disks made on a file system with ever less space are whole or absent, and `check` is clean."""
    site, images, directory = small_xfs.site, small_xfs.images, small_xfs.directory
    store_image(images, IMAGE_ID, Random(1).randbytes(2 * MIB + 77))
    insert_image(site.db)
    filler = directory / "filler"
    filler.touch()
    site.store._reflinks = False  # an overlay's bitmap is allocated in full, which takes space
    size = 256 * 1024 * MIB  # with a bitmap of 8 MiB
    made = refused = 0
    for free_bytes in range(20 * MIB, 0, -MIB // 2):
        _leave(filler, free_bytes)
        uuid = site.row(size, "creating", None)
        try:
            form = site.store.create_clone(uuid, size, images.reader(IMAGE_ID), IMAGE_ID)
        except NoSpace as error:
            refused += 1
            assert error.code == "no-space"
            assert site.store.form(uuid) is None
            site.db.connection.execute("DELETE FROM disks WHERE uuid = ?", (uuid,))
        else:
            made += 1
            site.db.connection.execute(
                "UPDATE disks SET state = 'available', form = ?, base_image = ?, base_manifest = ? "
                "WHERE uuid = ?",
                (form, IMAGE_ID, IMAGE_ID, uuid),
            )
            report = disk_check.check(site.configuration)
            assert (report.faults, report.leaks, report.disks) == ([], [], 1)
            site.store.delete(uuid)
            site.db.connection.execute("DELETE FROM disks WHERE uuid = ?", (uuid,))
        assert os.listdir(directory / "stage") == []
        assert os.listdir(directory / "disks") == []
    assert made > 5
    assert refused > 5
    filler.unlink()
    report = disk_check.check(site.configuration, deep=True)
    assert (report.faults, report.leaks) == ([], [])


def _leave(filler: Path, free_bytes: int) -> None:
    """Let a file take what a file system has free, but for some bytes."""
    with filler.open("r+b") as file:
        status = os.statvfs(filler.parent)
        present_bytes = os.fstat(file.fileno()).st_size
        wanted = present_bytes + status.f_bavail * status.f_frsize - free_bytes
        if wanted > present_bytes:
            os.posix_fallocate(file.fileno(), present_bytes, wanted - present_bytes)
        else:
            file.truncate(max(0, wanted))
            os.sync()


@pytest.mark.root
@pytest.mark.slow
def test_disks_beyond_the_promise_are_refused(tmp_path: Path) -> None:
    """`disk create` beyond what may be promised exits 7 with the numbers and leaves nothing."""
    with tempfile.TemporaryDirectory(prefix="sc-space-") as root:
        appliance = Appliance(Path(root), endpoint="http://127.0.0.1:9/")
        with appliance:
            account = appliance.json("cache", "status")
            assert account["promised_bytes"] == 0
            available_bytes = account["available_bytes"]
            size = str(5 * available_bytes // MIB * MIB)
            made = appliance.json("disk", "create", "--size", size)
            refused = appliance.run("disk", "create", "--size", str(2 * int(size)))
            assert refused.returncode == 7
            assert "[overcommit]" in refused.stderr
            assert size in refused.stderr
            assert [disk["uuid"] for disk in appliance.json("disk", "ls")["disks"]] == [
                made["uuid"]
            ]
            plan = appliance.json("cache", "plan")
            assert plan["space"]["promised_bytes"] == int(size)
            assert appliance.json("disk", "check")["faults"] == []
