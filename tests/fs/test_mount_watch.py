"""Noticing that the mount is gone."""

import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from stratocache.fs.mount_watch import MountWatch
from stratocache.fs.state import Database


@pytest.mark.root
def test_lost_mount_is_reported_once(tmp_path: Path) -> None:
    """A mount that somebody takes away is one event, and so is its return."""
    mount_point = tmp_path / "blocks"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(mount_point)]
    unmount = ["umount", "-l", str(mount_point)]
    subprocess.run(mount, check=True)
    with closing(Database(tmp_path / "state.db")) as database:
        database.migrate()
        watch = MountWatch(database, mount_point)
        assert watch.is_due()
        for change in (unmount, mount, unmount):
            watch.look()
            watch.look()
            subprocess.run(change, check=True)
        watch.look()
        assert not watch.is_due()
        kinds = [row["kind"] for row in database.rows("SELECT kind FROM events")]
    assert kinds == ["mount.missing", "mount.found", "mount.missing"]
