"""A guest on an image that only comes as a compressed stream, which flows while the guest boots."""

import contextlib
import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from stratodemo.guest import Guest
from support.appliance import Appliance
from support.guests import system_image
from support.monitor import Monitor
from support.publishing import Published, publish_file
from support.sluice import Sluice, sluice

MIB = 1024**2
TAIL_BYTES = 8 * MIB
END_BYTES = MIB
"""Zeros behind the tail, which the index tells: boot loaders look for RAID at the end of a disk."""
BEGUN_BYTES = MIB // 2
"""Of the compressed file: boot sectors and the beginning of the file system, no kernel."""
HELD_BYTES = 3 * MIB
"""Of the compressed file, its end: nothing but a part of the tail."""
STILL_S = 2.0
TIMEOUT_S = 180

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = f"""
image="$(disk 1)"
digest() {{ dd if="$image" bs={MIB} skip="$1" count=1 iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }}
report early "$(digest 1) $(dmesg | grep -c 'I/O error')"
read -r go
last=$((($(blockdev --getsize64 "$image") - {END_BYTES}) / {MIB} - 1))
report late "$(digest $last) $(dmesg | grep -c 'I/O error')"
"""


@dataclass
class Site:
    """The image, the server that holds it back, and how long the compressed file is."""

    published: Published
    gate: Sluice
    packed_bytes: int


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """The system image, a tail that no compressor makes smaller, and zeros; with an index."""
    folder = tmp_path / "published"
    folder.mkdir()
    image, packed = folder / "image", folder / "image.zst"
    subprocess.run(["cp", "--sparse=always", system_image(), image], check=True)
    with image.open("ab") as file:
        file.write(hashlib.shake_128(b"tail").digest(TAIL_BYTES))
        file.truncate(file.tell() + END_BYTES)
    with image.open("rb") as raw, packed.open("wb") as sink:
        zstandard.ZstdCompressor(level=1).copy_stream(raw, sink)
    with sluice(folder, packed.name, BEGUN_BYTES) as gate:
        published = publish_file(
            folder, image, source=packed, compression="zst",
            locations=[f"{gate.url}/{packed.name}"], index_url=gate.url,
        )  # fmt: skip
        shutil.rmtree(folder / "image.castr")
        yield Site(published, gate, packed.stat().st_size)


def test_a_guest_boots_while_the_stream_flows(tmp_path: Path, site: Site) -> None:
    """A guest waits for what has not flowed past, boots before the stream has ended, and reads right
    bytes and no error, of the end of the image as soon as that is here."""
    identifier = site.published.identifier
    image = site.published.image
    control = tmp_path / "qmp"
    with Appliance(
        tmp_path / "appliance", endpoint=site.published.endpoint,
        fingerprint=site.published.fingerprint, extra="fetch.quiet_s = 0.1",
    ) as appliance:  # fmt: skip
        launched = appliance.json(
            "launch", identifier, "--instance", "vm", "--readonly-disk", identifier
        )
        arguments = [*launched["qemu_args"], "-qmp", f"unix:{control},server=on,wait=off"]
        with Guest(arguments, SCRIPT) as guest:
            _wait_until_it_waits(control)
            assert "up" not in guest.reports
            site.gate.let(site.packed_bytes - HELD_BYTES)
            early = guest.wait_for("early", TIMEOUT_S)
            assert appliance.json("image", "show", identifier)["state"] == "provisional"
            guest.send("go")
            _wait_until_it_waits(control)
            assert "late" not in guest.reports
            site.gate.let(site.packed_bytes)
            late = guest.finish(TIMEOUT_S)["late"]
        assert early == f"{_sha256(image, MIB)} 0"
        assert late == f"{_sha256(image, image.stat().st_size - END_BYTES - MIB)} 0"
        _wait_until_verified(appliance, identifier)
        shown = appliance.json("image", "show", identifier)
        print(f"waited {shown['remote_wait_s']:.1f} s, {shown['remote_bytes']} bytes came")
        assert shown["remote_wait_s"] > STILL_S
        assert appliance.run("halt", "vm").returncode == 0


def _sha256(image: Path, offset: int) -> str:
    with image.open("rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(MIB)).hexdigest()


def _wait_until_it_waits(control: Path) -> None:
    """Return when a guest that had begun to read gets nothing to read any more."""
    deadline = time.monotonic() + TIMEOUT_S
    while not control.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with contextlib.closing(Monitor(control)) as monitor:
        counted, since = 0, time.monotonic()
        while not counted or time.monotonic() - since < STILL_S:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            stats = [device["stats"] for device in monitor.ask("query-blockstats")]
            done = sum(one["rd_operations"] + one["wr_operations"] for one in stats)
            if done != counted:
                counted, since = done, time.monotonic()


def _wait_until_verified(appliance: Appliance, identifier: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while appliance.json("image", "show", identifier)["state"] != "verified":
        assert time.monotonic() < deadline, appliance.log.read_text()[-4000:]
        time.sleep(0.2)
