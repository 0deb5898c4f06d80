"""The supervisor with real processes: whatever dies, whoever uses the disk notices a pause only."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fuse_child import STALLED_AT
from support.iscsi import Guest
from support.service_manager import ServiceManager
from support.supervised import START_TIMEOUT_S, Supervised, initiator, wait_for_end

from stratocache.fs.run_directory import RunDirectory

pytestmark = pytest.mark.root

KILLS = 8
WRITER = """
import os, select, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR)
number, longest = 0, 0.0
while not select.select([0], [], [], 0)[0]:
    started = time.monotonic()
    block = number.to_bytes(8, "little") * 8192
    offset = number % 64 * 65536
    assert os.pwrite(descriptor, block, offset) == 65536
    if number % 16 == 0:
        os.fsync(descriptor)
    assert os.pread(descriptor, 65536, offset) == block
    longest = max(longest, time.monotonic() - started)
    number += 1
print(number, longest, flush=True)
"""


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Supervised]:
    """A running appliance whose disk is exported."""
    with Supervised(tmp_path, export=True) as supervised:
        yield supervised


@pytest.mark.slow
def test_killed_blockd_is_a_pause_for_open_files(appliance: Supervised) -> None:
    """Reads and writes of an open file all succeed, and right, while blockd is killed."""
    chance = random.Random(1)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(appliance.disk)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        for _ in range(KILLS):
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(chance.uniform(0.0, 1.2))
            appliance.kill("blockd")
        output, _ = writer.communicate(timeout=30)
    count, longest = output.split()

    print(f"{KILLS} kills, {count} rounds, longest {float(longest):.2f} s")
    assert writer.returncode == 0
    assert int(count) > KILLS


@pytest.mark.slow
@pytest.mark.parametrize("victims", [("blockd",), ("tgtd",), ("tgtd", "blockd")], ids="+".join)
def test_killed_children_are_a_pause_for_guests(
    appliance: Supervised, victims: tuple[str, ...]
) -> None:
    """A guest's session sees no error and no wrong byte while children are killed under it."""
    chance = random.Random(2)
    pauses = []
    with Guest(initiator(appliance)) as guest:
        for _ in range(3):
            guest.rounds(chance.uniform(0.0, 0.2))
            for name in victims:
                appliance.kill(name)
            pauses.append(guest.rounds(1.2)[1])

    print(f"pauses after {victims}: {', '.join(f'{pause:.2f}' for pause in pauses)} s")


@pytest.mark.slow
def test_older_kernels_recover_too(tmp_path: Path) -> None:
    """Without re-send, tgtd goes first, the mount is made afresh, and guests see no error."""
    with (
        Supervised(tmp_path, export=True, resend=False) as appliance,
        Guest(initiator(appliance)) as guest,
    ):
        for _ in range(3):
            guest.rounds(0.1)
            before = appliance.child("tgtd")
            appliance.kill("blockd")
            _, longest = guest.rounds(1.2)
            assert appliance.child("tgtd") != before
            assert appliance.mounts() == 1
            print(f"pause {longest:.2f} s")


def test_flush_and_fua_reach_the_file(appliance: Supervised) -> None:
    """SYNCHRONIZE CACHE and a write with FUA are an fsync of the backing file; a write is none."""
    syncs = appliance.state_dir / "syncs"
    before = syncs.stat().st_size
    session = initiator(appliance)

    assert session.io("write -P 1 0 4k", "flush").returncode == 0
    after_flush = syncs.stat().st_size
    assert session.io("write -f -P 2 4k 4k").returncode == 0

    assert after_flush > before
    assert syncs.stat().st_size > after_flush


def test_killed_supervisor_takes_all_with_it(tmp_path: Path) -> None:
    """No child survives its supervisor; the next start cleans the mount and serves again."""
    supervised = Supervised(tmp_path, export=True)
    with supervised:
        for _ in range(2):
            assert initiator(supervised).io("write -P 3 0 4k").returncode == 0
            pids = list(supervised.children())
            assert len(pids) >= 3
            assert supervised.process is not None
            supervised.process.kill()
            supervised.wait()
            for pid in pids:
                wait_for_end(pid)
            assert supervised.mounts() == 1
            supervised.start()
            assert supervised.mounts() == 1
            assert initiator(supervised).io("read -P 3 0 4k").returncode == 0


def test_request_in_flight_keeps_nothing_alive(tmp_path: Path) -> None:
    """A killed supervisor takes a tgtd with it that waits for an answer nobody will give."""
    supervised = Supervised(tmp_path, export=True)
    stalls = supervised.state_dir / "stalls"
    with supervised:
        options = initiator(supervised).image_options
        with subprocess.Popen(
            ["qemu-io", "-r", "-t", "none", "-c", f"read {STALLED_AT} 4k", "--image-opts", options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as reader:  # fmt: skip
            try:
                deadline = time.monotonic() + START_TIMEOUT_S
                while stalls.stat().st_size == 0:
                    assert time.monotonic() < deadline, supervised.tail()
                pids = list(supervised.children())
                assert supervised.process is not None
                supervised.process.kill()
                supervised.wait()
                for pid in pids:
                    wait_for_end(pid)
                assert reader.poll() is None  # it has seen no error
            finally:
                reader.kill()


def test_killed_holder_is_replaced(appliance: Supervised) -> None:
    """A holder killed alone is started again and ends nothing."""
    tgtd = appliance.child("tgtd")

    appliance.kill("holder")

    assert appliance.child("tgtd") == tgtd
    assert initiator(appliance).io("write -P 1 0 4k").returncode == 0


def test_stacked_stale_mounts_are_cleaned(tmp_path: Path) -> None:
    """Several dead mounts on top of one another are all taken away at the start."""
    supervised = Supervised(tmp_path)
    blocks = supervised.directory.blocks
    blocks.mkdir(parents=True)
    dead = (
        "import sys; from pathlib import Path\n"
        "from stratocache.fs.fuse_mount import FuseMount\n"
        "mounts = [FuseMount.create(Path(sys.argv[1]), Path(sys.argv[2])) for _ in range(3)]"
    )
    subprocess.run(
        [sys.executable, "-c", dead, str(blocks), str(tmp_path / "init")],
        check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert supervised.mounts() == 3

    with supervised:
        assert supervised.mounts() == 1


def test_termination_leaves_nothing(appliance: Supervised) -> None:
    """SIGTERM with a guest logged in: status 0, no mount, no process, no socket."""
    with Guest(initiator(appliance)) as guest:
        guest.round()
        pids = list(appliance.children())
        status = appliance.stop()

        assert status == 0
        assert appliance.mounts() == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        assert sorted(path.name for path in appliance.directory.path.iterdir()) == [
            "blocks", "boot-id", "counts", "live", "serve.lock",
        ]  # fmt: skip


def test_second_instance_is_refused(appliance: Supervised) -> None:
    """Another supervisor on the same directory says who runs and exits with 4, harming nothing."""
    assert appliance.process is not None
    second = _serve(appliance)

    assert second.returncode == 4
    assert f"process {appliance.process.pid}" in second.stderr
    assert initiator(appliance).io("read 0 512").returncode == 0


def _serve(supervised: Supervised) -> subprocess.CompletedProcess[str]:
    """Run the supervisor's own command line on the same directories."""
    return subprocess.run(
        [sys.executable, "-m", "stratocache.fs.supervisor",
         "--run-dir", str(supervised.directory.path), "--state-dir", str(supervised.state_dir),
         "--config-json", str(supervised.config_json)],
        check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_taken_portal_is_refused(tmp_path: Path) -> None:
    """A port that another program keeps is named, status 4, and nothing stays."""
    supervised = Supervised(tmp_path, hasty=True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", supervised.port))
        other.listen()
        supervised.begin()
        assert supervised.process is not None
        try:
            status = supervised.wait()
        finally:
            if supervised.process is not None:
                supervised.stop()

    assert status == 4
    assert str(supervised.port) in supervised.tail()
    assert supervised.mounts() == 0


def test_foreign_mount_is_refused(tmp_path: Path) -> None:
    """A file system that is not ours at the mount point stays, with an error that names it."""
    supervised = Supervised(tmp_path)
    supervised.directory.blocks.mkdir(parents=True)
    blocks = str(supervised.directory.blocks)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", blocks], check=True)
    try:
        refused = _serve(supervised)
        assert (refused.returncode, supervised.mounts()) == (4, 1)
        assert "tmpfs" in refused.stderr
    finally:
        subprocess.run(["umount", blocks], check=True)


def test_broken_api_harms_nobody(tmp_path: Path) -> None:
    """An API that ends at once is tried again ever less often; the disk is served meanwhile."""
    supervised = Supervised(tmp_path, export=True, api="broken")
    supervised.begin()
    try:
        pids = {name: supervised.child(name) for name in ("blockd", "tgtd")}
        deadline = time.monotonic() + 20
        while supervised.log.read_text().count("api ended, status 7") < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        target = initiator(supervised)
        while target.io("write -P 4 0 4k").returncode:
            assert time.monotonic() < deadline, supervised.tail()
        assert {name: supervised.child(name) for name in pids} == pids
        starts = _times(supervised.log, "api started")
        assert starts[3] - starts[2] > starts[1] - starts[0]
        assert supervised.stop() == 0
    finally:
        supervised.__exit__(None, None, None)


def _times(log: Path, text: str) -> list[float]:
    """Return the seconds of the hour of the log lines with a text."""
    clocks = [line.split()[1].split(":") for line in log.read_text().splitlines() if text in line]
    return [float(clock[1]) * 60 + float(clock[2].replace(",", ".")) for clock in clocks]


def test_missing_program_harms_nobody(tmp_path: Path) -> None:
    """A program that cannot be run is logged and tried again; the others run."""
    supervised = Supervised(tmp_path, api="missing")
    supervised.begin()
    try:
        supervised.child("blockd")
        deadline = time.monotonic() + 20
        while supervised.log.read_text().count("api cannot be started") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert supervised.stop() == 0
    finally:
        supervised.__exit__(None, None, None)


def test_aborted_mount_comes_back(appliance: Supervised) -> None:
    """When somebody unmounts the tree by force, it is mounted afresh and targets work again."""
    before = appliance.child("blockd")
    subprocess.run(["umount", "-f", "-l", str(appliance.directory.blocks)], check=True)
    wait_for_end(before)

    deadline = time.monotonic() + 20
    while initiator(appliance).io("write -P 6 0 4k", "read -P 6 0 4k").returncode:
        assert time.monotonic() < deadline, appliance.tail()
    assert appliance.mounts() == 1


def test_children_inherit_only_what_they_need(appliance: Supervised) -> None:
    """blockd has /dev/fuse, and the holder, but not tgtd, whose end it must not hinder; nobody has
    the lock, and the API's worker dies with the API."""
    names = ("blockd", "holder", "tgtd", "api")
    links = {name: _open_files(appliance.child(name)) for name in names}

    assert {name: "/dev/fuse" in files for name, files in links.items()} == {
        "blockd": True, "holder": True, "tgtd": False, "api": False,
    }  # fmt: skip
    assert not any(path.endswith("serve.lock") for files in links.values() for path in files)
    api = appliance.child("api")
    (worker,) = Path(f"/proc/{api}/task/{api}/children").read_text().split()
    appliance.kill("api")
    wait_for_end(int(worker))


def _open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(link))
    return found


def test_systemd_is_told(tmp_path: Path) -> None:
    """READY=1 comes when all children are ready, STOPPING=1 at the end, and only from us."""
    supervised = Supervised(tmp_path)
    with ServiceManager(tmp_path / "notify") as manager:
        supervised.environment["NOTIFY_SOCKET"] = str(manager.path)
        with supervised:
            manager.wait_for("READY=1")
            variables = Path(f"/proc/{supervised.child('api')}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in variables
            supervised.stop()
        manager.wait_for("STOPPING=1")
        assert manager.said[0] != "STOPPING=1"


def test_live_bitmaps_of_another_boot_are_forgotten(tmp_path: Path) -> None:
    """What a reboot made inexact is removed before anybody serves; of the same boot it stays."""
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(tmp_path / "state")
    bitmap = directory.live / "disk.bitmap"
    bitmap.write_bytes(b"\xff")
    (directory.path / "boot-id").write_bytes(b"another boot, or \xff\n")

    with directory.lock():
        assert not bitmap.exists()
    bitmap.write_bytes(b"\xff")
    with directory.lock():
        assert bitmap.exists()
