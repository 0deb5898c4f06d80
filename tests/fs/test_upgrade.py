"""Upgrades in place: the same supervisor process goes on with other code, guests see a pause."""

import contextlib
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.iscsi import BusyGuest, Guest
from support.supervised import START_TIMEOUT_S, Supervised, initiator, upgrade_request, wait_for_end

from stratocache.fs.supervisor_status import State
from stratocache.fs.upgrade import Progress

PATIENCE_S = 120

pytestmark = pytest.mark.root


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Supervised]:
    """A running appliance whose disk is exported."""
    with Supervised(tmp_path, export=True) as supervised:
        yield supervised


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Supervised]:
    """A running appliance whose disk is exported, and that serves peers and the web."""
    with Supervised(tmp_path, export=True, peers=True, web=True) as supervised:
        yield supervised


def pids_of(appliance: Supervised) -> dict[str, int]:
    """Return the process ids of the supervisor and of its children."""
    assert appliance.process is not None
    names = ("holder", "blockd", "tgtd", "api", *(["peers", "web"] if appliance.peers_port else []))
    return {name: appliance.child(name) for name in names} | {"supervisor": appliance.process.pid}


def wait_for_state(appliance: Supervised, state: State) -> None:
    """Wait until the supervisor says that it is in a state."""
    deadline = time.monotonic() + 3 * START_TIMEOUT_S
    while (status := appliance.status()) is None or status.state is not state:
        assert time.monotonic() < deadline, appliance.tail()
        time.sleep(0.02)


@contextlib.contextmanager
def asking(connect: Callable[[], socket.socket]) -> Iterator[list[int]]:
    """Connect again and again; yield the processes that answered."""
    answered: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            with connect() as client:
                answered.append(int(client.recv(100)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answered
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_upgrade_is_a_pause(peer: Supervised) -> None:
    """Upgrades one after another keep the supervisor's process and replace blockd, the API and what
    serves the network; tgtd is replaced only when asked for. The guest sees no error, clients and
    peers are not refused."""
    with (
        Guest(initiator(peer)) as guest,
        BusyGuest(guest) as busy,
        asking(peer.connect) as answered,
        asking(peer.connect_as_peer) as peers_answered,
        asking(peer.connect_as_web) as web_answered,
    ):
        for tgtd in (False, False, True):
            before = pids_of(peer)
            busy.reset()
            record = peer.upgrade(upgrade_request(tgtd=tgtd))
            after = pids_of(peer)

            assert (record.progress, record.error) == (Progress.DONE, None)
            rolled = {step.name: step.pause_s for step in record.steps}
            print(f"{rolled}, guest {busy.pause():.2f} s")
            assert list(rolled) == ["blockd", "api", *(["tgtd"] if tgtd else [])]
            replaced = {name for name, pid in before.items() if after[name] != pid}
            assert replaced == {*rolled, "peers", "web"}
        assert {before["api"], after["api"]} <= set(answered)
        assert {before["peers"], after["peers"]} <= set(peers_answered)
        assert {before["web"], after["web"]} <= set(web_answered)
    assert peer.stop() == 0
    assert peer.mounts() == 0


def test_child_that_dies_after_an_upgrade_is_replaced(peer: Supervised) -> None:
    """The new supervisor knows the processes that the old one started: each that dies is replaced,
    and all die with it."""
    assert peer.upgrade().progress is Progress.DONE
    before = pids_of(peer)
    for name in ("holder", "blockd", "tgtd", "api", "peers", "web"):
        peer.kill(name)

    assert initiator(peer).io("write -P 2 0 4k").returncode == 0
    after = pids_of(peer)
    assert {name for name in before if before[name] == after[name]} == {"supervisor"}
    assert peer.process is not None
    peer.process.kill()
    peer.wait()
    for name in ("holder", "blockd", "tgtd", "api", "peers", "web"):
        wait_for_end(after[name])


@pytest.mark.parametrize("fault", ["missing", "broken", "refused"])
def test_code_that_cannot_take_over_changes_nothing(appliance: Supervised, fault: str) -> None:
    """An interpreter that is missing, does not start, or refuses leaves every process as it is."""
    request = upgrade_request()
    codes = {"missing": "code-missing", "broken": "code-broken", "refused": "state-too-new"}
    if fault == "missing":
        request = replace(request, python="/no/such/python")
    elif fault == "broken":
        request = replace(request, python="/bin/false")
    else:
        with contextlib.closing(sqlite3.connect(appliance.state_dir / "state.db")) as state:
            state.execute("PRAGMA user_version = 9999")
    before = pids_of(appliance)

    record = appliance.upgrade(request)

    assert record.progress is Progress.FAILED
    assert record.error is not None
    assert record.error["code"] == codes[fault]
    assert pids_of(appliance) == before
    wait_for_state(appliance, State.READY)


def test_request_of_another_user_is_refused(appliance: Supervised) -> None:
    """Only a request that the supervisor's own user wrote is followed."""
    request = appliance.directory.upgrade_request
    before = pids_of(appliance)
    upgrade_request().write(request)
    os.chown(request, 65534, 65534)
    assert appliance.process is not None
    appliance.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "was not written by" not in appliance.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert pids_of(appliance) == before
    assert not request.exists()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Supervised]:
    """The same, whose pauses between crashes do not grow to seconds."""
    with Supervised(tmp_path, export=True, hasty=True) as supervised:
        yield supervised


@pytest.mark.slow
def test_blockd_that_always_crashes_is_given_up(hasty: Supervised) -> None:
    """When the new blockd crashes ten times it is not started any more, and the upgrade, status and
    log say so: the guest waits, tgtd and API stay. SIGHUP tries again, and it goes on unharmed."""
    broken = hasty.state_dir / "broken"
    with Guest(initiator(hasty), PATIENCE_S) as guest, BusyGuest(guest) as busy:
        busy.reset()
        tgtd = hasty.child("tgtd")
        broken.touch()
        record = hasty.upgrade()
        assert record.error is not None
        assert record.error["code"] == "blockd-frozen"

        wait_for_state(hasty, State.FROZEN)
        status = hasty.status()
        assert status is not None
        assert "stratocache upgrade" in status.fault
        assert status.fault in hasty.log.read_text()
        assert status.children["blockd"].pid == 0
        assert hasty.log.read_text().count("blockd ended, status 3") == 10
        assert status.children["tgtd"].pid == tgtd
        with hasty.connect() as client:
            assert int(client.recv(100)) == status.children["api"].pid
        assert hasty.mounts() == 1
        broken.unlink()
        assert hasty.process is not None
        hasty.process.send_signal(signal.SIGHUP)
        wait_for_state(hasty, State.READY)
        print(f"pause {busy.pause():.1f} s")
        assert hasty.child("tgtd") == tgtd
