"""The pool: a real XFS file on a real loop device takes the place of a state directory."""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.appliance import Appliance, small_filesystem

from stratocache.cache.errors import (
    Conflict,
    Internal,
    InvalidInput,
    NoSpace,
    NotFound,
    NotVerified,
    StratocacheError,
)
from stratocache.fs import pool as pool_module
from stratocache.fs import pool_creation, reflink
from stratocache.fs.pool import POOL_BYTES_MIN, Pool, available
from stratocache.fs.run_directory import RunDirectory

MIB = 1024**2

pytestmark = pytest.mark.root


@dataclass
class Place:
    """Directories for a pool; what is mounted or attached below goes with the test."""

    root: Path

    @property
    def state_dir(self) -> Path:
        """The state directory."""
        return self.root / "state"

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.root / "run"

    def create(
        self, size_bytes: int = POOL_BYTES_MIN, path: Path | None = None, sparse: bool = False
    ) -> Pool:
        """Make the pool."""
        return pool_creation.create(
            self.state_dir, self.run_dir, size_bytes, path=path, sparse=sparse, reserve_bytes=MIB
        )

    def refused(self, category: type[StratocacheError], code: str, size_bytes: int) -> None:
        """Check that making the pool is refused and leaves no file, mount or record."""
        before = sorted(self.root.rglob("*"))
        with pytest.raises(category) as caught:
            self.create(size_bytes)
        assert caught.value.code == code
        after = [path for path in sorted(self.root.rglob("*")) if self.run_dir not in path.parents]
        assert [path for path in before if self.run_dir not in path.parents] == after
        assert self.mounts() == []
        assert loop_devices(self.root) == []

    def mounts(self) -> list[str]:
        """Return the mounts below the place."""
        return [
            line.split(" ")[4]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split(" ")[4].startswith(str(self.root))
        ]


def loop_devices(root: Path) -> list[str]:
    """Return the files below a folder that loop devices have open."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.append(backing.read_text().strip())
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith(str(root))]


@pytest.fixture
def place() -> Iterator[Place]:
    """Directories of a test's own, with a path that a socket fits in."""
    with tempfile.TemporaryDirectory(prefix="sc-pool-") as name:
        made = Place(Path(name))
        made.state_dir.mkdir(mode=0o700)
        made.run_dir.mkdir()
        try:
            yield made
        finally:
            for mount in reversed(made.mounts()):
                subprocess.run(["umount", mount], check=False)
        assert loop_devices(made.root) == []


def test_pool_shares_extents_and_keeps_what_was_there(place: Place) -> None:
    """A new pool is mounted at the state directory, knows reflinks, and has the old small files."""
    (place.state_dir / "state.db").write_bytes(b"rows")
    (place.state_dir / "state.db").chmod(0o600)
    (place.state_dir / "disks").mkdir()
    (place.state_dir / "stage").mkdir()
    (place.state_dir / "stage" / "half").write_bytes(b"fetched again")

    made = place.create()

    assert made.mounted
    assert place.mounts() == [str(place.state_dir)]
    assert reflink.supported(place.state_dir, place.state_dir)
    assert (place.state_dir / "state.db").read_bytes() == b"rows"
    assert (place.state_dir / "state.db").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(place.state_dir)) == ["pool.json", "state.db"]
    assert place.state_dir.stat().st_mode & 0o777 == 0o700
    status = made.status()
    assert (status.size_bytes, status.mounted) == (POOL_BYTES_MIN, True)
    assert status.free_bytes is not None
    assert 0.8 * POOL_BYTES_MIN < status.free_bytes < POOL_BYTES_MIN
    assert made.path == place.root / "state.pool.xfs"
    assert made.path.stat().st_mode & 0o777 == 0o600

    assert made.unmount()
    assert os.listdir(place.state_dir) == ["pool.json"]


def test_space_is_taken_at_once_unless_sparse(place: Place) -> None:
    """A pool owns its space from the start, so it cannot be taken away; a sparse one does not."""
    reserved = place.create()
    assert reserved.status().allocated_bytes >= POOL_BYTES_MIN
    reserved.unmount()
    os.unlink(place.state_dir / "pool.json")
    sparse = place.create(4 * POOL_BYTES_MIN, place.root / "other.xfs", sparse=True)
    assert sparse.status().size_bytes == 4 * POOL_BYTES_MIN
    assert sparse.status().allocated_bytes < POOL_BYTES_MIN // 2


def test_create_again_is_no_error(place: Place) -> None:
    """The same pool asked for again is mounted if it was not; another size or file is refused."""
    made = place.create()
    assert place.create() == made
    made.unmount()
    assert place.create() == made
    assert made.mounted
    for size_bytes, path in ((2 * POOL_BYTES_MIN, None), (POOL_BYTES_MIN, place.root / "b")):
        with pytest.raises(Conflict) as caught:
            place.create(size_bytes, path)
        assert caught.value.code == "pool-exists"


def test_content_survives_an_unmount(place: Place) -> None:
    """What is written into the pool is there when it is mounted again, at the same place."""
    made = place.create()
    (place.state_dir / "disks").mkdir()
    (place.state_dir / "disks" / "data").write_bytes(b"kept")
    made.unmount()
    assert not (place.state_dir / "disks").exists()
    found = Pool.read(place.state_dir)
    assert found == made
    with available(place.state_dir):
        assert (place.state_dir / "disks" / "data").read_bytes() == b"kept"
        with available(place.state_dir):
            pass
        assert place.mounts() == [str(place.state_dir)]
    assert place.mounts() == []
    assert loop_devices(place.root) == []


@pytest.mark.parametrize("mounted", [True, False])
def test_pool_grows_mounted_or_not(place: Place, mounted: bool) -> None:
    """File and file system grow together, content stays, and growing again changes nothing."""
    made = place.create()
    (place.state_dir / "kept").write_bytes(b"kept")
    if not mounted:
        made.unmount()
    for _ in range(2):
        made.grow(2 * POOL_BYTES_MIN, MIB)
        assert made.mounted is mounted
    with available(place.state_dir):
        status = made.status()
        assert status.size_bytes == 2 * POOL_BYTES_MIN
        assert status.allocated_bytes >= 2 * POOL_BYTES_MIN
        assert status.free_bytes is not None
        assert status.free_bytes > 1.7 * POOL_BYTES_MIN
        assert (place.state_dir / "kept").read_bytes() == b"kept"


def test_growth_that_was_cut_short_is_finished(place: Place) -> None:
    """When a crash left a longer file with the old file system in it, growing again finishes."""
    made = place.create()
    made.unmount()
    pool_module.extend(made.path, 2 * POOL_BYTES_MIN, sparse=True)
    made.mount()
    made.grow(2 * POOL_BYTES_MIN, MIB)
    free_bytes = made.status().free_bytes
    assert free_bytes is not None
    assert free_bytes > 1.7 * POOL_BYTES_MIN


def test_pool_neither_shrinks_nor_outgrows_its_file_system(place: Place) -> None:
    """A smaller size is refused, a larger one than fits too; the pool stays as it was."""
    made = place.create()
    with pytest.raises(InvalidInput) as smaller:
        made.grow(POOL_BYTES_MIN - 4096, MIB)
    assert smaller.value.code == "pool-shrink"
    with pytest.raises(NoSpace):
        made.grow(2**50, MIB)
    assert made.status().size_bytes == POOL_BYTES_MIN


def test_sizes_that_cannot_be_are_refused(place: Place) -> None:
    """Too small for XFS, and too large for the file system, leave nothing behind."""
    place.refused(InvalidInput, "pool-too-small", POOL_BYTES_MIN - 1)
    place.refused(NoSpace, "no-space", 2**50)


def test_full_file_system_leaves_nothing(place: Place) -> None:
    """A file system that fills up while the pool is made gives `no-space` and is empty again."""
    with small_filesystem(place.root / "small", 64 * MIB) as small:
        path = small / "pool.xfs"
        with pytest.raises(NoSpace):
            place.create(path=path)
        # the estimate may be wrong: others write too
        (small / "file").touch()
        with pytest.raises(NoSpace):
            pool_module.extend(small / "file", 128 * MIB, sparse=False)
        assert (small / "file").stat().st_size == 0
        assert os.listdir(small) == ["file"]
    assert not (place.state_dir / "pool.json").exists()


@pytest.mark.parametrize("name", ["manifests/I.caibx", "disks/a-disk"])
def test_images_and_disks_are_not_hidden(place: Place, name: str) -> None:
    """A state directory that has images or disks is refused and stays as it is."""
    path = place.state_dir / name
    path.parent.mkdir()
    path.write_bytes(b"somebody's")
    place.refused(Conflict, "state-not-empty", POOL_BYTES_MIN)
    assert path.read_bytes() == b"somebody's"


def test_running_daemon_is_refused(place: Place) -> None:
    """While the daemon has the state directory nothing is mounted over it."""
    directory = RunDirectory(place.run_dir)
    directory.prepare()
    with directory.lock():
        place.refused(Conflict, "already-running", POOL_BYTES_MIN)


def test_pool_inside_its_own_state_directory_is_refused(place: Place) -> None:
    """A file that the mount would hide is refused."""
    with pytest.raises(InvalidInput) as caught:
        place.create(path=place.state_dir / "pool.xfs")
    assert caught.value.code == "pool-path-inside"


def test_file_of_others_is_not_touched(place: Place) -> None:
    """A file that is there already is neither overwritten nor taken for a pool."""
    (place.root / "state.pool.xfs").write_bytes(b"somebody's")
    place.refused(Conflict, "pool-file-exists", POOL_BYTES_MIN)
    assert (place.root / "state.pool.xfs").read_bytes() == b"somebody's"


def test_missing_mkfs_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mkfs.xfs the package to install is named, and nothing is left behind."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(pool_module, "_SYSTEM_PATH", "/nowhere")
    place.refused(NotFound, "program-missing", POOL_BYTES_MIN)


def test_failing_mkfs_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When mkfs.xfs fails its complaint is passed on, and nothing is left behind."""
    program = tmp_path / "mkfs.xfs"
    program.write_text("#!/bin/sh\necho 'no such feature' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place.refused(Internal, "pool-program-failed", POOL_BYTES_MIN)


def test_another_file_is_not_mounted(place: Place) -> None:
    """A pool's file that is gone, no XFS, or another pool's is refused, never mounted."""
    made = place.create()
    made.unmount()
    aside = place.root / "aside"
    made.path.rename(aside)
    with pytest.raises(NotVerified) as missing:
        made.mount()
    assert missing.value.code == "pool-missing"
    made.path.write_bytes(b"something else")
    with pytest.raises(NotVerified) as foreign:
        made.mount()
    assert foreign.value.code == "pool-foreign"
    shutil.copyfile(aside, made.path)
    subprocess.run(["xfs_admin", "-U", "generate", made.path], check=True, capture_output=True)
    with pytest.raises(NotVerified):
        made.mount()
    assert place.mounts() == []


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 2}', b"[1]", b"\xff\xfe"])
def test_damaged_record_is_never_taken_for_no_pool(place: Place, content: bytes) -> None:
    """A record that cannot be read stops everything that would use the hidden directory."""
    (place.state_dir / "pool.json").write_bytes(content)
    with pytest.raises(NotVerified) as caught:
        Pool.read(place.state_dir)
    assert caught.value.code == "pool-record-damaged"
    place.refused(NotVerified, "pool-record-damaged", POOL_BYTES_MIN)


def test_busy_pool_stays_mounted(place: Place) -> None:
    """A pool that somebody uses is not torn away; it is unmounted when nobody does."""
    made = place.create()
    with (place.state_dir / "file").open("wb") as file:
        assert not made.unmount()
        assert made.mounted
        file.write(b"x")
    assert made.unmount()


def test_full_pool_is_an_error_not_a_broken_file_system(place: Place) -> None:
    """Filling the pool gives ENOSPC to the writer; the file system goes on working."""
    place.create()
    with (
        (place.state_dir / "big").open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space") as caught,
    ):
        while True:
            file.write(bytes(8 * MIB))
    assert caught.value.errno == errno.ENOSPC
    (place.state_dir / "big").unlink()
    (place.state_dir / "small").write_bytes(b"works")


@pytest.mark.slow
def test_daemon_mounts_its_pool_and_takes_it_down(place: Place) -> None:
    """`serve` mounts the pool, makes disks in it, finds it again, and leaves no mount behind."""
    appliance = Appliance(place.root / "appliance", endpoint="http://127.0.0.1:9/")
    try:
        made = appliance.json("pool", "create", "--size", str(POOL_BYTES_MIN))
        assert made["mounted"] is True
        status = appliance.json("pool", "status")
        assert status == made
        with appliance:
            disk = appliance.json("disk", "create", "--size", "1G", "--tag", "in the pool")
            assert (appliance.state_dir / "disks" / disk["uuid"] / "data").exists()
            assert appliance.run("pool", "create", "--size", "1G").returncode == 4
            grown = appliance.json("pool", "grow", "--size", "1G")
            assert grown["size_bytes"] == 1024 * MIB
            assert grown["free_bytes"] > 900 * MIB
            appliance.kill()
            appliance.start()
            assert appliance.json("disk", "ls")["disks"][0]["uuid"] == disk["uuid"]
        assert place.mounts() == []
        assert os.listdir(appliance.state_dir) == ["pool.json"]
        assert appliance.json("pool", "status")["mounted"] is False
        with appliance:
            assert appliance.json("disk", "ls")["disks"][0]["tag"] == "in the pool"
        assert place.mounts() == []
    finally:
        appliance.stop()


def test_daemon_does_not_start_beside_a_missing_pool(place: Place) -> None:
    """When the pool's file is not there, `serve` says so and does not begin an empty state."""
    appliance = Appliance(place.root / "appliance", endpoint="http://127.0.0.1:9/")
    made = appliance.json("pool", "create", "--size", str(POOL_BYTES_MIN))
    subprocess.run(["umount", appliance.state_dir], check=True)
    Path(made["path"]).rename(place.root / "aside")
    done = appliance.run("serve", timeout_s=30)
    assert done.returncode == 6
    assert "is not there" in done.stderr
    assert os.listdir(appliance.state_dir) == ["pool.json"]
