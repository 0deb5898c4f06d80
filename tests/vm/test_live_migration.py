"""A guest moves from one QEMU to another while it writes to its disk, which moves with it."""

import json
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.publishing import publish_image
from support.writer import compile_writer, faults, progress, verdicts, writer_script

BASE_BYTES = 4 * 1024**2
DISK_BYTES = 8 * 1024**2
BOOT_TIMEOUT_S = 120
MIGRATION_TIMEOUT_S = 120
ROUNDS = 30

pytestmark = [
    pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)
]  # fmt: skip


class Monitor:
    """One QEMU's QMP socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        deadline = time.monotonic() + 30
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command; return what it answers."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def wait_for_status(self, command: str, wanted: str, timeout_s: float) -> None:
        """Wait until a query's status is the wanted one."""
        deadline = time.monotonic() + timeout_s
        while (shown := self(command)).get("status") != wanted:
            assert shown.get("status") != "failed", shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


@contextmanager
def _monitor(path: Path) -> Iterator[Monitor]:
    monitor = Monitor(path)
    try:
        yield monitor
    finally:
        monitor.close()


def test_guest_writes_on_while_it_moves(tmp_path: Path) -> None:
    """Every write to an overlay and a raw disk that was acknowledged before, while and after a live
    migration is there, without an I/O error, and the source is cut off when it is complete."""
    published = publish_image(tmp_path / "published", BASE_BYTES)
    with Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    ) as appliance:
        blank = {"size_bytes": DISK_BYTES}
        disks = {
            "overlay": _create(appliance, {**blank, "reference": published.identifier}),
            "raw": _create(appliance, blank),
        }
        sources = [_ask(appliance, path, {"instance": "vm1"}) for path in disks.values()]
        program, script = compile_writer(tmp_path), writer_script(list(disks))
        with Guest(_arguments(sources, program, tmp_path / "qmp1"), script, name="source") as old:
            old.wait_for("begun", BOOT_TIMEOUT_S)
            before = _wait_for_rounds(old, ROUNDS)
            targets = [
                _ask(appliance, f"{path}/{source['id']}/migrate", {"instance": "vm1"})
                for path, source in zip(disks.values(), sources, strict=True)
            ]
            arguments = _arguments(targets, program, tmp_path / "qmp2")
            with Guest([*arguments, "-incoming", "defer"], script, name="destination") as new:
                _move(tmp_path)
                for path, target in zip(disks.values(), targets, strict=True):
                    status, held = appliance.request("POST", f"{path}/{target['id']}/complete", {})
                    assert (status, held["migrates"], held["state"]) == (200, None, "ready")
                    _, answer = appliance.request("GET", path)
                    assert [item["id"] for item in answer["attachments"]] == [target["id"]]
                _wait_for_rounds(new, before + 2 * ROUNDS)
                new.send("stop")
                new.finish(BOOT_TIMEOUT_S)
        events = _events(appliance)
    for source, target in zip(sources, targets, strict=True):
        assert (target["migrates"], target["epoch"]) == (source["id"], source["epoch"] + 1)
        assert target["chap"]["secret"] != source["chap"]["secret"]
        assert ("attachment.fenced", source["id"]) in events
        assert ("attachment.migrated", target["id"]) in events
    found = verdicts(new.console)
    assert set(found) == set(disks)
    assert faults(old.console) == faults(new.console) == []
    for name, verdict in found.items():
        print(name, verdict)
        assert (verdict.errors, verdict.lost, verdict.wrong) == (0, 0, 0)
        assert verdict.acknowledged > 2 * ROUNDS
        assert verdict.synced > 0


def _ask(appliance: Appliance, path: str, body: dict[str, Any]) -> Any:
    status, answer = appliance.request("POST", path, body)
    assert status == 201, answer
    return answer


def _create(appliance: Appliance, request: dict[str, Any]) -> str:
    """Create a disk; return where its attachments are."""
    return f"/v1/disks/{_ask(appliance, '/v1/disks', request)['uuid']}/attachments"


def _arguments(attachments: Sequence[dict[str, Any]], program: Path, qmp: Path) -> list[str]:
    disks = [
        word.replace("werror=stop,rerror=stop", "werror=report,rerror=report")
        for attachment in attachments
        for word in attachment["qemu_args"]
    ]
    return [
        *file_disk(system_image(), boot=True, readonly=True),
        *file_disk(program, readonly=True),
        *disks,
        "-qmp", f"unix:{qmp},server=on,wait=off",
    ]  # fmt: skip


def _move(folder: Path) -> None:
    """Migrate the running guest through a Unix socket; return when it runs on the other side."""
    stream = f"unix:{folder / 'stream'}"
    with _monitor(folder / "qmp1") as source, _monitor(folder / "qmp2") as target:
        target("migrate-incoming", uri=stream)
        source("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 2000})
        source("migrate", uri=stream)
        source.wait_for_status("query-migrate", "completed", MIGRATION_TIMEOUT_S)
        target.wait_for_status("query-status", "running", MIGRATION_TIMEOUT_S)


def _wait_for_rounds(guest: Guest, wanted: int) -> int:
    """Wait until every thread of the writer has done so many rounds; return the fewest of one."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while True:
        ticks = progress(guest.console)
        if ticks and min(ticks[-1][1].values()) > wanted:
            return min(ticks[-1][1].values())
        assert time.monotonic() < deadline, guest.console[-5:]
        time.sleep(0.05)


def _events(appliance: Appliance) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(appliance.state_dir / "state.db")) as database:
        return database.execute("SELECT kind, subject FROM events").fetchall()
