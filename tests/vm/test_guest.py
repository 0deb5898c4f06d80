"""Real guests of the demonstration image, without Stratocache: the ground other tests stand on."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stratodemo.data_image import digests, file_tree
from stratodemo.guest import Guest, GuestError
from support.guests import BareTarget, data_image, file_disk, system_image

pytestmark = [pytest.mark.vm, pytest.mark.slow]

_BOOT_TIMEOUT_S = 120.0
_DISK_BYTES = 64 * 1024**2

_WRITE = """
part=$(make_partition "$(disk 1)") && mkfs.ext4 -q "$part" && mount "$part" /mnt || exit 1
yes 'kept by the guest' | head -c 3000000 > /mnt/letter
sync
umount /mnt
report written yes
"""
_READ = """
mount -o ro "$(disk 1)1" /mnt || exit 1
report letter "$(sha256sum < /mnt/letter | cut -d' ' -f1)"
"""
_LETTER = hashlib.sha256((b"kept by the guest\n" * 200_000)[:3_000_000]).hexdigest()

_READ_SHARED = """
data=$(disk 1)
mount -o ro "${data}1" /mnt || exit 1
report record "$(sha256sum < /mnt/raw/record-3.bin | cut -d' ' -f1)"
report mounted yes
read -r answer
if dd if=/dev/zero of="$data" bs=4096 count=1 oflag=direct 2>/dev/null; then
    report write accepted
else
    report write "$answer"
fi
"""


@pytest.fixture
def blank_disk(tmp_path: Path) -> Path:
    """A sparse file for a guest to partition."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(_DISK_BYTES)
    return path


@pytest.fixture
def boot_copy(tmp_path: Path) -> Path:
    """A writable copy of the system image."""
    path = tmp_path / "boot.raw"
    path.write_bytes(system_image().read_bytes())
    return path


@pytest.fixture
def target() -> Iterator[BareTarget]:
    """A private tgtd with nothing exported."""
    with BareTarget() as running:
        yield running


def test_boots_from_a_file_and_keeps_a_disk(boot_copy: Path, blank_disk: Path) -> None:
    """A guest boots from its disk alone and what it wrote is there for the next boot."""
    disks = [*file_disk(boot_copy, boot=True), *file_disk(blank_disk)]
    with Guest(disks, _WRITE) as writer:
        assert writer.report_time("up", _BOOT_TIMEOUT_S) > 0
        assert writer.finish(_BOOT_TIMEOUT_S)["written"] == "yes"
    with Guest(disks, _READ) as reader:
        assert reader.finish(_BOOT_TIMEOUT_S)["letter"] == _LETTER


def test_boots_over_iscsi_and_keeps_a_disk(
    target: BareTarget, boot_copy: Path, blank_disk: Path
) -> None:
    """Boot and data disk over iSCSI with CHAP: a second guest reads what the first wrote."""
    boot = target.disk(target.export(boot_copy), boot=True)
    data = target.disk(target.export(blank_disk))
    with Guest([*boot, *data], _WRITE) as writer:
        writer.finish(_BOOT_TIMEOUT_S)
    with Guest([*boot, *data], _READ) as reader:
        assert reader.finish(_BOOT_TIMEOUT_S)["letter"] == _LETTER


def test_two_guests_share_a_read_only_disk(target: BareTarget) -> None:
    """Two guests at once mount one exported image, read the same bytes, and cannot write."""
    data = target.export(data_image(), readonly=True)
    shared = target.disk(data, readonly=True)
    boot = target.export(system_image(), readonly=True)
    expected = digests(file_tree())["raw/record-3.bin"]
    before = data_image().read_bytes()
    one = Guest([*target.disk(boot, boot=True, readonly=True), *shared], _READ_SHARED, name="one")
    two = Guest([*target.disk(boot, boot=True, readonly=True), *shared], _READ_SHARED, name="two")
    with one, two:
        for guest in (one, two):
            guest.wait_for("mounted", _BOOT_TIMEOUT_S)
        for guest in (one, two):
            guest.send("refused")
        for guest in (one, two):
            reports = guest.finish(_BOOT_TIMEOUT_S)
            assert (reports["record"], reports["write"]) == (expected, "refused")
    assert data_image().read_bytes() == before


def test_failing_script_is_a_failed_guest() -> None:
    """A script that ends with another status than 0 makes `finish` raise with the console's end."""
    disks = [*file_disk(system_image(), boot=True, readonly=True)]
    script = "report begun yes; disk 1 || exit 3"
    with Guest(disks, script, name="failing") as guest:
        assert guest.wait_for("begun", _BOOT_TIMEOUT_S) == "yes"
        with pytest.raises(GuestError, match=r"script ended with 3(.|\n)*STRATO exit=3"):
            guest.finish(_BOOT_TIMEOUT_S)


def test_wrong_secret_is_refused(target: BareTarget) -> None:
    """A guest with a wrong CHAP secret ends at once, before any boot, with QEMU's complaint."""
    disk = target.disk(target.export(data_image()), boot=True, secret="guessed-wrong-1")
    with Guest(disk, "") as guest, pytest.raises(GuestError, match="Failed to log in"):
        guest.wait_for("up", _BOOT_TIMEOUT_S)


def test_leaving_the_block_ends_the_machine() -> None:
    """A guest that still runs when its block is left, here by an error, is killed and reaped."""
    with (
        pytest.raises(ZeroDivisionError),
        Guest(file_disk(system_image(), boot=True, readonly=True), "") as guest,
    ):
        pid = guest.pid
        os.kill(pid, 0)
        raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
