"""Whole appliances of several versions of the code: upgrades between them, and bugs in them."""

import errno
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.code_tree import copy_code
from support.iscsi import BusyGuest, Guest, Initiator
from support.publishing import Published, publish_image

from stratocache.fs.schema import MIGRATIONS

pytestmark = [pytest.mark.root, pytest.mark.slow]

IMAGE_BYTES = 12 * 1024**2
MIGRATION = "CREATE TABLE added (number INTEGER PRIMARY KEY) STRICT;"
BAD_OFFSET, FATAL_OFFSET = 1024**2, 2 * 1024**2
READ = '"""Read, from the event loop when nothing has to be waited for."""\n'
BUG = f"""
        if off == {BAD_OFFSET}:
            raise RuntimeError("a bug")
        if off == {FATAL_OFFSET} and not os.path.exists(os.environ["BUG_MARK"]):
            os.mkdir(os.environ["BUG_MARK"])
            raise SystemExit(9)
"""


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """An image."""
    return publish_image(tmp_path / "published", IMAGE_BYTES)


@pytest.fixture
def appliance(tmp_path: Path, published: Published) -> Iterator[Appliance]:
    """An appliance of version 0.1.0, in a copy of the code of its own."""
    made = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    made.environment["PYTHONPATH"] = copy_code(tmp_path / "old", "0.1.0")
    with made:
        yield made


def attach(appliance: Appliance, published: Published) -> tuple[str, Initiator]:
    """Make a clone and attach it; return its UUID and how to reach it."""
    status, disk = appliance.request("POST", "/v1/disks", {"reference": published.identifier})
    assert status == 201, disk
    path = f"/v1/disks/{disk['uuid']}/attachments"
    status, attachment = appliance.request("POST", path, {"instance": "vm"})
    assert status == 201, attachment
    chap = attachment["chap"]
    return disk["uuid"], Initiator(
        appliance.port, attachment["target_iqn"], chap["username"], chap["secret"]
    )


def upgrade(appliance: Appliance, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the `upgrade` command of some code."""
    appliance.environment["PYTHONPATH"] = code
    return appliance.run("upgrade", *options)


def version_of(appliance: Appliance) -> str:
    """Return the version that the API says."""
    _, index = appliance.request("GET", "/v1")
    version: str = index["version"]
    return version


def schema_of(appliance: Appliance) -> int:
    """Return how many migrations the state has had."""
    with closing(sqlite3.connect(appliance.state_dir / "state.db")) as state:
        count: int = state.execute("PRAGMA user_version").fetchone()[0]
    return count


def daemon_check(appliance: Appliance) -> dict[str, Any]:
    """Return what `doctor` finds about the daemon."""
    checks: list[dict[str, Any]] = json.loads(appliance.run("doctor", "--json").stdout)["checks"]
    return next(check for check in checks if check["name"] == "daemon")


def test_upgrade_goes_on_with_other_code(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """`upgrade` of a newer version's command lets every process go on with it, state migrated;
    that of the older one is refused then and touches nothing; a guest sees no error."""
    old = appliance.environment["PYTHONPATH"]
    new = copy_code(tmp_path / "new", "0.2.0", migration=MIGRATION)
    assert appliance.process is not None
    _, initiator = attach(appliance, published)
    with Guest(initiator, 120) as guest, BusyGuest(guest) as busy:
        busy.reset()
        assert (version_of(appliance), schema_of(appliance)) == ("0.1.0", len(MIGRATIONS))
        appliance.environment["PYTHONPATH"] = new
        assert "this is version 0.2.0" in daemon_check(appliance)["detail"]

        done = upgrade(appliance, new)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("version 0.1.0 -> 0.2.0\n")
        print(done.stdout, f"guest {busy.pause():.2f} s")
        assert (version_of(appliance), schema_of(appliance)) == ("0.2.0", len(MIGRATIONS) + 1)
        assert appliance.process.poll() is None
        running = [pid for pid in appliance.pids("stratocache") if new in _environment(pid)]
        assert set(appliance.pids("stratocache.fs.blockd", "stratocache.api")) <= set(running)

        before = appliance.pids()
        refused = upgrade(appliance, old)
        assert refused.returncode == 4
        assert "nothing was changed" in refused.stderr
        assert "[state-too-new]" in refused.stderr
        assert "[upgrade-refused]" in refused.stderr
        assert appliance.pids() == before

        again = upgrade(appliance, new, "--tgtd", "--json")
        assert again.returncode == 0, again.stderr
        assert '"name": "tgtd"' in again.stdout
        print(f"guest with tgtd {busy.pause():.2f} s")
        assert daemon_check(appliance)["verdict"] == "OK"


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:
        return ""


def test_upgrade_needs_a_daemon(tmp_path: Path) -> None:
    """Without a daemon `upgrade` says so and exits with 10."""
    appliance = Appliance(tmp_path, endpoint="file:///nowhere")

    refused = appliance.run("upgrade")

    assert refused.returncode == 10
    assert "[not-running]" in refused.stderr


READER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
for offset in sys.argv[2:]:
    try:
        print(len(os.pread(descriptor, 4096, int(offset))))
    except OSError as error:
        print(-error.errno)
"""


def test_bug_of_a_handler_costs_one_request(
    appliance: Appliance, published: Published, tmp_path: Path
) -> None:
    """An exception in a handler is EIO for its request alone, and blockd goes on; one that ends
    blockd costs nothing: the request is sent again to the next one."""
    mark = tmp_path / "mark"
    appliance.environment["BUG_MARK"] = str(mark)
    buggy = copy_code(tmp_path / "buggy", "0.1.1", changes={"fs/tree.py": (READ, BUG)})
    appliance.stop()
    appliance.environment["PYTHONPATH"] = buggy
    appliance.start()
    uuid, _ = attach(appliance, published)
    path = appliance.run_dir / "blocks/disks" / uuid
    before = appliance.pids("stratocache.fs.blockd")

    offsets = (0, BAD_OFFSET, 0)
    assert _read(path, *offsets) == [4096, -errno.EIO, 4096]
    assert appliance.pids("stratocache.fs.blockd") == before
    assert "a bug" in appliance.log.read_text()

    assert _read(path, FATAL_OFFSET, 0) == [4096, 4096]
    assert mark.exists()
    assert "blockd ended, status" in appliance.log.read_text()


def _read(path: Path, *offsets: int) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path), *map(str, offsets)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return [int(line) for line in done.stdout.split()]
