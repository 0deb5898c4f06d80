"""An appliance and open-iscsi in a kernel guest: what tests call there (`support.guest_agent`)."""

import contextlib
import json
import mmap
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratocache.api.open_iscsi import Device, Node
from stratocache.fs.target import LUN
from support import appliance as appliances
from support.appliance import Appliance
from support.kernel_guest import DATA
from support.lio_guest import PORT
from support.service_manager import ServiceManager

INITIATOR = "iqn.1993-08.org.debian:01:kernel-guest"
COMMANDS = Path("/run/iscsiadm.log")
"""Every command line of iscsiadm since the guest was booted."""
_DAEMON_LOG = Path("/run/iscsid.log")
_RECORDS = Path("/etc/iscsi/nodes")
_TIMEOUT_S = 900.0
_BLOCK_BYTES = 4096
_PLACES = 64
_PROGRAMS = {
    "blockd": "stratocache.fs.blockd",
    "tgtd": "tgtd -f",
    "lio_server": "stratocache.fs.lio_server",
    "api": "stratocache.api.server",
}
_running: dict[str, Appliance] = {}
_writers: dict[str, "Writer"] = {}


def prepare() -> None:
    """Start udev, name the initiator, and put a script before iscsiadm that notes what it is told.

    What is done already stays.
    """
    if COMMANDS.exists():
        return
    COMMANDS.touch()
    subprocess.run(["/lib/systemd/systemd-udevd", "--daemon"], check=True, timeout=_TIMEOUT_S)
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName={INITIATOR}\n")
    Path("/etc/iscsi/iscsid.conf").write_text("node.startup = manual\n")
    shim = Path("/run/before/iscsiadm")
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$*" >> {COMMANDS}\nexec /usr/sbin/iscsiadm "$@"\n')
    shim.chmod(0o755)
    os.environ["PATH"] = f"{shim.parent}:{os.environ['PATH']}"


def log_in(iqn: str, address: str, port: int, username: str, secret: str) -> Device:
    """Log in to a target's logical unit."""
    return Node(iqn, address, port, LUN).log_in(username, secret)


def log_out(iqn: str, address: str, port: int) -> None:
    """Log out of it."""
    Node(iqn, address, port, LUN).log_out()


def start_iscsid() -> None:
    """Start open-iscsi's daemon."""
    subprocess.run(["modprobe", "iscsi_tcp"], check=True, timeout=_TIMEOUT_S)
    with _DAEMON_LOG.open("ab") as log:
        subprocess.Popen(
            ["iscsid", "-f", "-d", "1"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    deadline = time.monotonic() + _TIMEOUT_S
    while not _daemon_listens():
        assert time.monotonic() < deadline, _DAEMON_LOG.read_text()
        time.sleep(0.05)


def _daemon_listens() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex("\0ISCSIADM_ABSTRACT_NAMESPACE") == 0


def initiator_state() -> str:
    """Return what the initiator's side says, for messages."""
    states = [
        f"{path}: {path.read_text().strip()}"
        for pattern in ("iscsi_session/session*/state", "block/sd*/device/state")
        for path in Path("/sys/class").glob(pattern)
    ]
    kernel = subprocess.run(["dmesg"], check=False, capture_output=True, text=True).stdout
    return "\n".join([*states, kernel[-2000:], _DAEMON_LOG.read_text()[-3000:]])


def start_appliance(backend: str, endpoint: str, fingerprint: str) -> None:
    """Start `stratocache serve` with a back end; it listens on every address of the guest.

    With LIO under a service manager: the kernel goes on when everything of ours is killed, and would
    tell initiators of the end of the FUSE connection.
    """
    os.environ |= {
        "STRATOCACHE_ISCSI__BACKEND": backend,
        "STRATOCACHE_ISCSI__ADDRESS": "0.0.0.0",
        "STRATOCACHE_ISCSI__PORT": str(PORT),
        "STRATOCACHE_API__WORKERS": "1",
    }
    appliances.START_TIMEOUT_S = int(_TIMEOUT_S)
    appliances.STOP_TIMEOUT_S = int(_TIMEOUT_S)
    new = Appliance(DATA / backend, endpoint=endpoint, fingerprint=fingerprint)
    if backend == "lio":
        new.manager = ServiceManager(DATA / "notify")
        new.manager.__enter__()
    new.start()
    _running[backend] = new


def stop_appliance(backend: str) -> None:
    """Stop it, in order."""
    appliance = _running.pop(backend)
    appliance.stop()
    if appliance.manager is not None:
        appliance.manager.__exit__()


def kill(backend: str, *victims: str) -> None:
    """Kill programs of the appliance by name, or all; start it again when its supervisor is among
    them, and return when it is ready."""
    appliance = _running[backend]
    supervisor = appliance.process
    assert supervisor is not None
    if not victims:
        appliance.kill()
        appliance.start()
        return
    wanted = [_PROGRAMS[victim] for victim in victims if victim != "supervisor"]
    pids = appliance.pids(*wanted) if wanted else []
    assert bool(pids) == bool(wanted)
    if "supervisor" in victims:
        pids.append(supervisor.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it dies with its parent
            os.kill(pid, signal.SIGKILL)
    if "supervisor" in victims:
        supervisor.wait(_TIMEOUT_S)
        appliance.start()
        return
    deadline = time.monotonic() + _TIMEOUT_S
    while not (appliance.ready() and set(appliance.pids(*wanted)) - set(pids)):
        assert time.monotonic() < deadline, appliance.log.read_text()[-4000:]
        time.sleep(0.1)


def starts_of_tgtd(backend: str) -> int:
    """Return how often the supervisor has started tgtd, or what stands for it, again."""
    status = json.loads((_running[backend].run_dir / "supervisor.json").read_text())
    restarts: int = status["children"]["tgtd"]["restarts"]
    return restarts


def command(backend: str, line: str) -> tuple[int, Any]:
    """Run a `stratocache` command with --json; return its status and what it wrote."""
    done = _running[backend].run(*shlex.split(line), "--json", timeout_s=_TIMEOUT_S)
    text = done.stdout if done.returncode == 0 else done.stderr
    try:
        return done.returncode, json.loads(text)
    except ValueError:
        return done.returncode, done.stdout + done.stderr


def log(backend: str) -> str:
    """Return the end of the appliance's log."""
    return _running[backend].log.read_text()[-4000:]


def records() -> dict[str, tuple[int, str]]:
    """Return open-iscsi's node records: path → mode and text."""
    found = [path for path in _RECORDS.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mode & 0o777, path.read_text()) for path in found}


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return Path(path).exists()


def logged_in() -> bool:
    """Whether the kernel has any iSCSI session."""
    return any(Path("/sys/class/iscsi_session").glob("session*"))


def write_blocks(device: str, fill: int, count: int) -> None:
    """Write blocks of one byte past the page cache and flush the device."""
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, _BLOCK_BYTES * 256) as buffer:
        buffer[:] = bytes([fill]) * len(buffer)
        for _ in range(count * _BLOCK_BYTES // len(buffer)):
            os.write(descriptor, buffer)
    os.fsync(descriptor)
    os.close(descriptor)


def read_block(device: str, number: int) -> bytes:
    """Read one block past the page cache."""
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:
        assert os.preadv(descriptor, [buffer], number * _BLOCK_BYTES) == _BLOCK_BYTES
        os.close(descriptor)
        return bytes(buffer)


def size_bytes(device: str) -> int:
    """Return what the kernel knows of a device's size."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def wait_for_size(device: str, wanted_bytes: int) -> None:
    """Rescan the sessions until a device has a size; its session may be about to come back."""
    deadline = time.monotonic() + _TIMEOUT_S
    while size_bytes(device) != wanted_bytes:
        assert time.monotonic() < deadline, f"{size_bytes(device)} instead of {wanted_bytes}"
        subprocess.run(
            ["iscsiadm", "-m", "session", "--rescan"], check=False, timeout=_TIMEOUT_S,
            capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.2)


def allocated_bytes(backend: str, disk: str) -> int:
    """Return what a raw disk's file takes."""
    return (_running[backend].state_dir / "disks" / disk / "data").stat().st_blocks * 512


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer did, none of which failed."""

    rounds: int
    lost: int
    """Blocks that had something else at the end than was last written to them."""


class Writer:
    """Writes numbered blocks to a device and reads them back, in a thread, until it is told to stop."""

    def __init__(self, device: str) -> None:
        self.rounds = 0
        self.longest_s = 0.0
        self.error: BaseException | None = None
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                self._round()
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.rounds += 1
        except BaseException as error:
            self.error = error
            raise

    def _round(self) -> None:
        place = self.rounds % _PLACES * _BLOCK_BYTES
        descriptor = os.open(self._device, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _BLOCK_BYTES) as buffer:
                text = _text(self.rounds)
                buffer[:] = text
                os.pwrite(descriptor, buffer, place)
                os.fsync(descriptor)
                buffer[:] = bytes(_BLOCK_BYTES)
                os.preadv(descriptor, [buffer], place)
                assert buffer[:] == text, f"block of round {self.rounds} is lost"
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        """Finish the round."""
        self._stop.set()
        self._thread.join(_TIMEOUT_S)
        assert not self._thread.is_alive(), "a request never ends"

    def lost(self) -> int:
        """Count the blocks that are not what was last written to them."""
        last = range(max(0, self.rounds - _PLACES), self.rounds)
        return sum(read_block(self._device, number % _PLACES) != _text(number) for number in last)


def _text(number: int) -> bytes:
    return f"round {number}".encode().ljust(_BLOCK_BYTES, b".")


def start_writing(device: str) -> None:
    """Write to a device until `stop_writing`."""
    _writers[device] = Writer(device)


def rounds_written(device: str) -> int:
    """Return how many blocks were written and read back; none of it may have failed."""
    writer = _writers[device]
    assert writer.error is None, repr(writer.error)
    return writer.rounds


def pause(device: str) -> float:
    """Return how long the longest round has taken since this was last asked, in seconds."""
    writer = _writers[device]
    longest_s, writer.longest_s = writer.longest_s, 0.0
    return longest_s


def stop_writing(device: str) -> Written:
    """Stop, and read everything again. No round may have failed."""
    writer = _writers.pop(device)
    writer.stop()
    assert writer.error is None, repr(writer.error)
    return Written(writer.rounds, writer.lost())
