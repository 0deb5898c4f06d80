"""Disks on a file system that is full: writes wait, fail, and go on; nothing that was written is lost.

The state directory is a small ext4 on a loop device, which a ballast file fills to the last block;
the appliance with its state database is on it too.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import file_disk, system_image
from support.iscsi import Initiator
from support.monitor import Monitor
from support.publishing import publish_image

MIB = 1024**2
HOST_BYTES = 64 * MIB
IMAGE_BYTES = 6 * MIB
DISK_BYTES = 48 * MIB
PIECE_BYTES = 256 * 1024
WAITS = 4
WRITE_WAIT_S = 3
TIMEOUT_S = 60

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Host:
    """An appliance on a small file system, and the file that fills that up."""

    def __init__(self, appliance: Appliance, identifier: str) -> None:
        self.appliance = appliance
        self.identifier = identifier
        self._ballast = appliance.state_dir.parent / "ballast"
        self._ballast.touch()

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all space but so much."""
        os.sync()  # what is delayed takes its place first
        piece = HOST_BYTES
        with self._ballast.open("r+b") as file:
            while piece >= 1024:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), piece)
                except OSError:
                    piece //= 2
        self.free(leave_bytes)

    def free(self, size_bytes: int) -> None:
        """Give so much space back."""
        os.truncate(self._ballast, max(0, self._ballast.stat().st_size - size_bytes))

    def disk(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Create a disk and attach it; return its UUID and the attachment."""
        status, disk = self.appliance.request("POST", "/v1/disks", request)
        assert status == 201, disk
        path = f"/v1/disks/{disk['uuid']}/attachments"
        status, attachment = self.appliance.request("POST", path, {"instance": disk["uuid"]})
        assert status == 201, attachment
        return disk["uuid"], attachment

    def initiator(self, attachment: dict[str, Any]) -> Initiator:
        """Return the way to an attached disk."""
        chap = attachment["chap"]
        return Initiator(
            self.appliance.port, attachment["target_iqn"], chap["username"], chap["secret"]
        )

    def waits(self) -> int:
        """Return how often a disk has begun to wait for space."""
        return self.appliance.log.read_text().count("waits for space")

    def faults(self) -> list[Any]:
        """Return what `disk check` finds wrong with any disk."""
        faults: list[Any] = self.appliance.json("disk", "check")["faults"]
        return faults


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A running appliance on its small file system."""
    published = publish_image(tmp_path / "published", IMAGE_BYTES)
    with _small_ext4(tmp_path) as mount_point:
        appliance = Appliance(
            tmp_path / "appliance", endpoint=published.endpoint,
            fingerprint=published.fingerprint, state_dir=mount_point / "state",
        )  # fmt: skip
        text = appliance.configuration.read_text()
        wanted = f"reserve_bytes = {MIB}\nwrite_wait_s = {WRITE_WAIT_S}"
        appliance.configuration.write_text(text.replace("reserve_bytes = 16777216", wanted))
        with appliance:
            yield Host(appliance, published.identifier)


@contextmanager
def _small_ext4(folder: Path) -> Iterator[Path]:
    file, mount_point = folder / "small", folder / "mounted"
    mount_point.mkdir()
    with file.open("wb") as opened:
        opened.truncate(HOST_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-J", "size=4", file], check=True)
    subprocess.run(["mount", "-o", "loop", file, mount_point], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True)


def _write(initiator: Initiator, piece: int) -> subprocess.CompletedProcess[str]:
    return initiator.io(f"write -P {piece + 1} {piece * PIECE_BYTES} {PIECE_BYTES}")


def _require_pieces(initiator: Initiator, count: int) -> None:
    done = initiator.io(
        *(f"read -P {piece + 1} {piece * PIECE_BYTES} {PIECE_BYTES}" for piece in range(count))
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0 and "failed" not in text and "rror" not in text, text


def test_full_at_every_write_of_a_workload(host: Host) -> None:
    """Each write to an overlay waits for space and then ends; one that waits too long fails, as on a
    raw disk at once; both disks have all that was written, and go on when there is space."""
    overlay_uuid, attached = host.disk({"reference": host.identifier, "size_bytes": DISK_BYTES})
    overlay = host.initiator(attached)
    raw_uuid, attached = host.disk({"size_bytes": DISK_BYTES})
    raw = host.initiator(attached)
    for piece in range(WAITS):
        assert _write(raw, piece).returncode == 0
    assert raw.io("flush").returncode == 0

    with ThreadPoolExecutor(1) as writer:
        for piece in range(WAITS):
            host.fill()
            before, write = host.waits(), writer.submit(_write, overlay, piece)
            deadline = time.monotonic() + TIMEOUT_S
            while host.waits() == before:
                assert not write.done() and time.monotonic() < deadline, "the write did not wait"
                time.sleep(0.01)
            host.free(2 * MIB)
            assert write.result().returncode == 0

    host.fill()
    for initiator in (overlay, raw):
        started = time.monotonic()
        refused = _write(initiator, WAITS)
        took_s = time.monotonic() - started
        assert refused.returncode != 0
        assert "failed" in refused.stdout + refused.stderr
        assert (took_s >= WRITE_WAIT_S) == (initiator is overlay), took_s
        _require_pieces(initiator, WAITS)
    assert host.faults() == []

    host.free(HOST_BYTES)
    for initiator in (overlay, raw):
        assert _write(initiator, WAITS).returncode == 0
        assert initiator.io("flush").returncode == 0
        _require_pieces(initiator, WAITS + 1)
    host.appliance.stop()
    assert host.faults() == []
    host.appliance.start()
    for initiator in (overlay, raw):
        _require_pieces(initiator, WAITS + 1)
    assert {overlay_uuid, raw_uuid} == {item["uuid"] for item in _disks(host)}


def _disks(host: Host) -> list[dict[str, Any]]:
    disks: list[dict[str, Any]] = host.appliance.request("GET", "/v1/disks")[1]["disks"]
    return disks


BLOCKS = 12
GUEST_SCRIPT = f"""
device="$(disk 1)"
report begun
read go
number=0
while [ $number -lt {BLOCKS} ]; do
    yes "block $number" | head -c {MIB} > /tmp/block
    dd if=/tmp/block of="$device" bs={MIB} seek=$number conv=fsync,notrunc 2>/dev/null || exit 1
    number=$((number + 1))
    report written $number
done
echo 3 > /proc/sys/vm/drop_caches
report sum $(dd if="$device" bs={MIB} count={BLOCKS} 2>/dev/null | sha256sum)
"""


@pytest.mark.vm
def test_guest_pauses_and_goes_on(host: Host, tmp_path: Path) -> None:
    """A guest with the QEMU arguments that we hand out is stopped when no space comes, sees no error,
    and when it is continued after space was freed it ends its work with every byte right."""
    uuid, attachment = host.disk({"reference": host.identifier, "size_bytes": DISK_BYTES})
    control = tmp_path / "qmp"
    arguments = [
        *file_disk(system_image(), boot=True, readonly=True), *attachment["qemu_args"],
        "-qmp", f"unix:{control},server=on,wait=off",
    ]  # fmt: skip
    with Guest(arguments, GUEST_SCRIPT) as guest:
        guest.wait_for("begun", TIMEOUT_S)
        monitor = Monitor(control)
        try:
            host.fill(leave_bytes=4 * MIB)
            guest.send("go")
            monitor.wait_for("STOP")
            assert monitor.ask("query-status")["status"] == "io-error"
            assert "BLOCK_IO_ERROR" in monitor.events
            assert int(guest.reports["written"]) < BLOCKS
            host.free(HOST_BYTES)
            assert monitor.ask("cont") == {}
            reports = guest.finish(TIMEOUT_S)
        finally:
            monitor.close()
    content = b"".join(
        (b"block %d\n" % number * MIB)[:MIB] for number in range(BLOCKS)
    )  # fmt: skip
    assert reports["sum"].split()[0] == hashlib.sha256(content).hexdigest()
    assert not [line for line in guest.console if "I/O error" in line.text]
    host.appliance.json("disk", "detach", uuid)
    assert host.faults() == []
