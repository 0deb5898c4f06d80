"""The descriptors that systemd keeps: the FUSE connection outlives even a killed supervisor."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fuse_child import STALLED_AT
from support.iscsi import BusyGuest, Guest
from support.service_manager import ServiceManager
from support.supervised import START_TIMEOUT_S, Supervised, initiator, wait_for_end

pytestmark = pytest.mark.root

ROUNDS = 3
VICTIMS = (("supervisor",), ("blockd", "supervisor"), ("supervisor", "blockd"))
KEPT = "the FUSE connection was kept"
WRITER = """
import os, select, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
number = 0
while not select.select([0], [], [], 0)[0]:
    block = number.to_bytes(8, "little") * 8192
    offset = number % 32 * 65536 + 4194304
    assert os.pwrite(descriptor, block, offset) == 65536
    assert os.pread(descriptor, 65536, offset) == block
    number += 1
    print(number, flush=True)
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    """A service manager."""
    with ServiceManager(tmp_path / "notify") as manager:
        yield manager


@pytest.fixture
def appliance(tmp_path: Path, manager: ServiceManager) -> Iterator[Supervised]:
    """A running appliance whose disk is exported, under a service manager."""
    supervised = Supervised(tmp_path, export=True)
    supervised.manager = manager
    with supervised:
        yield supervised


@pytest.fixture
def peer(tmp_path: Path, manager: ServiceManager) -> Iterator[Supervised]:
    """The same, that serves peers and the web too."""
    supervised = Supervised(tmp_path, export=True, peers=True, web=True)
    supervised.manager = manager
    with supervised:
        yield supervised


@pytest.mark.slow
def test_killed_supervisor_is_a_pause(appliance: Supervised) -> None:
    """The supervisor is killed, alone and with blockd: an open file of the mount sees no error, a
    guest's session neither, and the mount is the same as before."""
    chance = random.Random(3)
    pauses = []
    with (
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(appliance.disk)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as writer,
        Guest(initiator(appliance)) as guest,
        BusyGuest(guest) as busy,
    ):  # fmt: skip
        assert writer.stdout is not None
        for number in range(ROUNDS):
            busy.reset()
            assert not busy.ended_within(chance.uniform(0.0, 0.3))
            assert writer.stdout.readline()
            assert appliance.process is not None
            pids = {"supervisor": appliance.process.pid, "blockd": appliance.child("blockd")}
            children = list(appliance.children())
            for name in VICTIMS[number % len(VICTIMS)]:
                os.kill(pids[name], signal.SIGKILL)
            appliance.wait()
            appliance.start()
            for pid in children:
                wait_for_end(pid)
            pauses.append(busy.pause())
        output, _ = writer.communicate(timeout=30)

    print(f"pauses of the guest: {', '.join(f'{pause:.2f}' for pause in pauses)} s")
    assert writer.returncode == 0
    assert int(output.split()[-1]) > ROUNDS
    assert appliance.log.read_text().count(KEPT) == ROUNDS
    assert appliance.mounts() == 1


def test_new_tgtd_waits_for_the_end_of_the_old(appliance: Supervised) -> None:
    """A tgtd that was killed while it waited for an answer ends when the next blockd has given it;
    only then the next tgtd starts, and the guest's read succeeds."""
    stalls = appliance.state_dir / "stalls"
    with subprocess.Popen(
        ["qemu-io", "-r", "-t", "none", "-c", f"read {STALLED_AT} 4k",
         "--image-opts", initiator(appliance).image_options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as reader:  # fmt: skip
        try:
            _wait(lambda: stalls.stat().st_size == 1)
            tgtd = appliance.child("tgtd")
            assert appliance.process is not None
            appliance.process.kill()
            appliance.wait()
            appliance.begin()
            _wait(lambda: stalls.stat().st_size == 2)  # sent again
            assert Path(f"/proc/{tgtd}").exists()
            status = appliance.status()
            assert status is not None
            assert status.children["tgtd"].pid == 0

            (appliance.state_dir / "answered").touch()
            wait_for_end(tgtd)
            output, _ = reader.communicate(timeout=60)
            assert "read 4096/4096" in output
        finally:
            reader.kill()


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_clients_and_peers_wait(peer: Supervised) -> None:
    """A client of either kind, or a peer, that comes while no supervisor runs is answered by the
    next one's children."""
    assert peer.process is not None
    peer.process.kill()
    peer.wait()
    with (
        peer.connect() as client,
        peer.connect_as_peer() as other,
        peer.connect_as_web() as browser,
    ):
        peer.start()
        assert int(client.recv(100)) == peer.child("api")
        assert int(other.recv(100)) == peer.child("peers")
        assert int(browser.recv(100)) == peer.child("web")


def test_stopped_appliance_stores_nothing(peer: Supervised, manager: ServiceManager) -> None:
    """While it runs, the connection and the listening sockets are stored; after a stop nothing is."""
    assert set(manager.stored) == {"fuse", "api", "peers", "web"}

    assert peer.stop() == 0
    manager.wait_for("STOPPING=1")

    assert manager.stored == {}
    assert peer.mounts() == 0


def test_lost_connection_is_replaced(appliance: Supervised, manager: ServiceManager) -> None:
    """What was unmounted by force while no supervisor ran is mounted afresh and stored again."""
    assert appliance.process is not None
    appliance.process.kill()
    appliance.wait()
    subprocess.run(["umount", "-f", "-l", str(appliance.directory.blocks)], check=True)
    appliance.start()

    assert set(manager.stored) == {"fuse", "api"}
    assert appliance.mounts() == 1
    assert initiator(appliance).io("write -P 5 0 4k", "read -P 5 0 4k").returncode == 0


def test_older_kernels_begin_anew(tmp_path: Path, manager: ServiceManager) -> None:
    """Without re-send a kept connection cannot go on: it is aborted, and a new one made."""
    supervised = Supervised(tmp_path, export=True, resend=False)
    supervised.manager = manager
    with supervised, Guest(initiator(supervised)) as guest, BusyGuest(guest) as busy:
        busy.reset()
        assert supervised.process is not None
        supervised.process.kill()
        supervised.wait()
        supervised.start()
        print(f"pause {busy.pause():.2f} s")
        assert KEPT not in supervised.log.read_text()
        assert supervised.mounts() == 1
