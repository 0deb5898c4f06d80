"""fio writes and verifies with four jobs while its disk is snapshotted and promoted under it.

Twice: on the overlay's own file in the FUSE tree, which goes away when the disk becomes raw, so that
only snapshots are taken there; and as a guest sees the disk, over iSCSI, where the switches from the
FUSE path to the raw file and back happen while fio runs. There QEMU's storage daemon is the
initiator, and its own FUSE export is the file that fio has.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance
from support.publishing import Published, publish_image

MIB = 1024**2
IMAGE_BYTES = 12 * MIB
JOBS = 4
JOB_BYTES = 6 * MIB
DISK_BYTES = JOBS * JOB_BYTES
RUNTIME_S = int(os.environ.get("CRASH_FIO_S", "12"))
TIMEOUT_S = 60

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300 + 2 * RUNTIME_S)]


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """An image in a catalogue."""
    return publish_image(tmp_path / "published", IMAGE_BYTES)


@pytest.fixture
def appliance(tmp_path: Path, published: Published) -> Iterator[Appliance]:
    """A running appliance."""
    made = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint
    )
    with made:
        yield made


@pytest.fixture
def disk(appliance: Appliance, published: Published) -> str:
    """The UUID of an overlay disk."""
    request = {"reference": published.identifier, "size_bytes": DISK_BYTES}
    status, made = appliance.request("POST", "/v1/disks", request)
    assert status == 201, made
    uuid: str = made["uuid"]
    return uuid


def _fio(file: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start fio: blocks of 6 KiB, so that every second write begins or ends inside a block."""
    return subprocess.Popen(
        ["fio", "--name=job", f"--filename={file}", f"--numjobs={JOBS}", f"--size={JOB_BYTES}",
         f"--offset_increment={JOB_BYTES}", "--rw=randwrite", "--bs=6k", "--ioengine=psync",
         "--direct=1", "--fdatasync=64", "--verify=crc32c", "--verify_backlog=64",
         "--verify_fatal=1", "--time_based", f"--runtime={RUNTIME_S}", "--output-format=json",
         f"--output={output}"],
        cwd=output.parent, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _verify_during(
    file: Path, folder: Path, appliance: Appliance, changes: Sequence[Sequence[str]]
) -> str:
    """Run fio, and commands one after another meanwhile, until it ends; return what happened. All
    of `changes` must have ended by then."""
    output = folder / "fio.json"
    fio = _fio(file, output)
    done = 0
    try:
        while fio.poll() is None:
            appliance.json(*changes[done % len(changes)])
            done += fio.poll() is None
    finally:
        fio.kill()
        fio.wait()
    text = output.read_text()
    # a line about jobs that share a file comes first; each has its own part of it
    report: dict[str, Any] = json.loads(text[text.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0] * JOBS, report
    assert fio.returncode == 0
    # it only reads to verify
    assert all(job["read"]["total_ios"] and job["write"]["total_ios"] for job in report["jobs"])
    assert done >= len(changes), f"only {done} changes while fio ran"
    written_bytes = sum(job["write"]["io_bytes"] for job in report["jobs"])
    longest_s = max(job["write"]["clat_ns"]["max"] for job in report["jobs"]) / 1e9
    return (
        f"{written_bytes / MIB:.0f} MiB written and verified during {done} changes, "
        f"longest write {longest_s:.2f} s"
    )


def test_snapshots_under_fio(
    appliance: Appliance, disk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four jobs on the overlay's file read back what they wrote, however often it is snapshotted."""
    file = appliance.run_dir / "blocks" / "disks" / disk
    told = _verify_during(file, tmp_path, appliance, [["disk", "snapshot", disk]] * 3)
    with capsys.disabled():
        print(f"\nsnapshots: {told}")
    assert appliance.json("disk", "check")["faults"] == []


def test_promotion_under_fio(
    appliance: Appliance, disk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same over iSCSI, while the disk becomes raw, an overlay again by a snapshot, and raw."""
    attachment = appliance.json("disk", "attach", disk, "--instance", "vm")
    changes = [["disk", "snapshot", disk], ["disk", "hydrate", disk]]
    with _as_file(attachment["qemu_args"], tmp_path / "exported") as file:
        told = _verify_during(file, tmp_path, appliance, changes * 2)
    with capsys.disabled():
        print(f"\npromotion and snapshots: {told}")
    assert appliance.json("disk", "check")["faults"] == []


@contextmanager
def _as_file(qemu_args: Sequence[str], file: Path) -> Iterator[Path]:
    """Give a disk as a file, by QEMU's storage daemon and the arguments that a guest would get."""
    _, secret, _, node, _, _ = qemu_args
    name = next(part for part in node.split(",") if part.startswith("node-name="))
    file.touch()
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--object", secret, "--blockdev", node,
         "--export", f"fuse,id=file,{name},mountpoint={file},writable=on"],
    )  # fmt: skip
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not os.path.ismount(file):
            assert process.poll() is None and time.monotonic() < deadline, "no export"
            time.sleep(0.02)
        yield file
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)
