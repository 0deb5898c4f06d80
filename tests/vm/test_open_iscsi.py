"""The kernel initiator of Debian's kernel, iscsid and udev, in a guest, on this machine's appliance."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support import initiator_guest as inside
from support.appliance import Appliance
from support.kernel_guest import KernelGuest
from support.publishing import Published, publish_image

from stratocache.api.open_iscsi import Device
from stratocache.cache.errors import Conflict, Refused, Unreachable

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

MIB = 1024**2
BASE_BYTES = 4 * MIB
DISK_BYTES = 32 * MIB
GROWN_BYTES = 48 * MIB
_HOST = "10.0.2.2"
"""What the guest's network calls this machine."""
_ROUNDS_TIMEOUT_S = 200.0


@dataclass
class Bench:
    """The appliance here, the initiator there."""

    guest: KernelGuest
    appliance: Appliance
    published: Published

    def attached(self, form: str) -> tuple[str, dict[str, Any]]:
        """Create a disk and attach it; return its UUID and the attachment."""
        base = {"reference": self.published.identifier} if form == "overlay" else {}
        status, disk = self.appliance.request(
            "POST", "/v1/disks", {**base, "size_bytes": DISK_BYTES}
        )
        assert status == 201, disk
        uuid: str = disk["uuid"]
        wanted = {"instance": "there", "initiator": inside.INITIATOR}
        status, attachment = self.appliance.request("POST", f"/v1/disks/{uuid}/attachments", wanted)
        assert status == 201, attachment
        return uuid, attachment

    def log_in(self, attachment: dict[str, Any], secret: str | None = None) -> Device:
        """Log in to an attachment."""
        chap = attachment["chap"]
        return self.guest.call(
            inside.log_in, attachment["target_iqn"], _HOST, self.appliance.port,
            chap["username"], secret or chap["secret"],
        )  # fmt: skip

    def log_out(self, attachment: dict[str, Any]) -> None:
        """Log out of an attachment."""
        self.guest.call(inside.log_out, attachment["target_iqn"], _HOST, self.appliance.port)

    def remove(self, uuid: str, attachment: dict[str, Any]) -> None:
        """Detach and delete a disk."""
        path = f"/v1/disks/{uuid}"
        for gone in (f"{path}/attachments/{attachment['id']}", path):
            status, answer = self.appliance.request("DELETE", gone)
            assert status in (200, 204), answer


@pytest.fixture(scope="module")
def bench(kernel_guest: KernelGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """An appliance with an image, and the guest with a named initiator but without iscsid."""
    published = publish_image(tmp_path_factory.mktemp("published"), BASE_BYTES)
    kernel_guest.call(inside.prepare)
    with Appliance(
        tmp_path_factory.mktemp("appliance"),
        endpoint=published.endpoint,
        fingerprint=published.fingerprint,
    ) as appliance:
        yield Bench(kernel_guest, appliance, published)


@pytest.fixture(scope="module")
def iscsid(bench: Bench) -> Bench:
    """The same with open-iscsi's daemon, after its absence has been seen."""
    uuid, attachment = bench.attached("raw")
    with pytest.raises(Unreachable) as caught:
        bench.log_in(attachment)
    assert caught.value.code == "iscsid-not-running"
    assert bench.guest.call(inside.records) == {}
    bench.remove(uuid, attachment)
    bench.guest.call(inside.start_iscsid)
    return bench


@pytest.mark.parametrize("form", ["raw", "overlay"])
def test_device_comes_grows_and_goes(iscsid: Bench, form: str) -> None:
    """The device has its by-path name, keeps what is written, sees the growth, and is gone after."""
    bench, guest = iscsid, iscsid.guest
    uuid, attachment = bench.attached(form)
    shown = bench.log_in(attachment)
    where = f"ip-{_HOST}:{bench.appliance.port}-iscsi-{attachment['target_iqn']}-lun-1"
    assert shown.path == f"/dev/disk/by-path/{where}"
    assert guest.call(inside.size_bytes, shown.path) == DISK_BYTES
    assert bench.log_in(attachment) == shown

    guest.call(inside.write_blocks, shown.path, 7, 2048)
    assert guest.call(inside.read_block, shown.path, 2047) == b"\x07" * 4096
    if form == "raw":
        file = bench.appliance.state_dir / "disks" / uuid / "data"
        before = file.stat().st_blocks * 512
        guest.run("blkdiscard", "--offset", "0", "--length", str(4 * MIB), shown.path)
        assert before - file.stat().st_blocks * 512 == 4 * MIB
        assert guest.call(inside.read_block, shown.path, 0) == bytes(4096)

    status, answer = bench.appliance.request(
        "PATCH", f"/v1/disks/{uuid}", {"size_bytes": GROWN_BYTES}
    )
    assert status in (200, 202), answer
    guest.call(inside.wait_for_size, shown.path, GROWN_BYTES)
    assert guest.call(inside.read_block, shown.path, 2047) == b"\x07" * 4096
    assert guest.call(inside.read_block, shown.path, GROWN_BYTES // 4096 - 1) == bytes(4096)

    bench.log_out(attachment)
    assert not guest.call(inside.logged_in)
    assert guest.call(inside.records) == {}
    assert not guest.call(inside.exists, shown.path)
    bench.log_out(attachment)
    bench.remove(uuid, attachment)


def test_secret_is_in_the_record_only(iscsid: Bench) -> None:
    """The secret is in a file that only root reads, and was on no command line of iscsiadm."""
    uuid, attachment = iscsid.attached("raw")
    iscsid.log_in(attachment)

    ((mode, text),) = iscsid.guest.call(inside.records).values()
    lines = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    assert mode == 0o600
    assert lines["node.session.auth.password"] == attachment["chap"]["secret"]
    assert lines["node.startup"] == "manual"
    assert lines["node.session.timeo.replacement_timeout"] == "-1"
    commands = iscsid.guest.run("cat", str(inside.COMMANDS))
    assert "--login" in commands
    assert attachment["chap"]["secret"] not in commands

    iscsid.log_out(attachment)
    iscsid.remove(uuid, attachment)


def test_wrong_secret_leaves_nothing(iscsid: Bench) -> None:
    """A login that is refused is told as such, and no session and no record stay."""
    uuid, attachment = iscsid.attached("raw")

    with pytest.raises(Refused) as caught:
        iscsid.log_in(attachment, "not-the-secret-at-all")

    assert caught.value.code == "login-refused"
    assert not iscsid.guest.call(inside.logged_in)
    assert iscsid.guest.call(inside.records) == {}
    iscsid.remove(uuid, attachment)


def test_mounted_device_stays(iscsid: Bench) -> None:
    """Logging out is refused while a file system of the device is mounted, and works after."""
    uuid, attachment = iscsid.attached("raw")
    device = iscsid.log_in(attachment)
    iscsid.guest.run("mkfs.ext4", "-q", device.path)
    iscsid.guest.run("mount", device.path, "/mnt")

    with pytest.raises(Conflict) as caught:
        iscsid.log_out(attachment)

    assert caught.value.code == "device-in-use"
    iscsid.guest.run("umount", "/mnt")
    iscsid.log_out(attachment)
    iscsid.remove(uuid, attachment)


@pytest.mark.parametrize("form", ["raw", "overlay"])
def test_deaths_are_pauses(iscsid: Bench, form: str) -> None:
    """The device sees no error and loses nothing when `blockd`, tgtd, or everything is killed."""
    bench, guest = iscsid, iscsid.guest
    uuid, attachment = bench.attached(form)
    device = bench.log_in(attachment).path
    guest.call(inside.start_writing, device)
    _more_rounds(bench, device)
    for name in ("stratocache.fs.blockd", "tgtd -f"):
        for pid in bench.appliance.pids(name):
            os.kill(pid, signal.SIGKILL)
        _more_rounds(bench, device)
    bench.appliance.kill()
    bench.appliance.start()
    _more_rounds(bench, device)
    longest_s = guest.call(inside.pause, device)
    written = guest.call(inside.stop_writing, device)
    print(f"{form}: {written.rounds} rounds, longest {longest_s:.1f} s")
    assert written.lost == 0

    bench.log_out(attachment)
    bench.remove(uuid, attachment)


def _more_rounds(bench: Bench, device: str) -> None:
    before = bench.guest.call(inside.rounds_written, device)
    deadline = time.monotonic() + _ROUNDS_TIMEOUT_S
    while bench.guest.call(inside.rounds_written, device) < before + 3:
        assert time.monotonic() < deadline, bench.guest.call(inside.initiator_state)
        time.sleep(0.1)
