"""An iSCSI initiator for tests: libiscsi through Debian's `iscsi-*` tools and QEMU's block layer."""

import contextlib
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from stratocache.fs.portal import Portal
from stratocache.fs.target_process import TargetProcess

_COMMAND_TIMEOUT_S = 20
_START_TIMEOUT_S = 20
INITIATOR = "iqn.2026-11.org.example:tests"


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True)
class Initiator:
    """How to reach one logical unit, and as whom."""

    port: int
    iqn: str
    username: str = ""
    secret: str = ""
    name: str = INITIATOR
    lun: int = 1

    @property
    def portal(self) -> str:
        """The portal's address and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The URL that libiscsi takes, with the secret in it."""
        account = f"{self.username}%{self.secret}@" if self.username else ""
        return f"iscsi://{account}{self.portal}/{self.iqn}/{self.lun}"

    @property
    def image_options(self) -> str:
        """The same for QEMU, with the initiator's name, which its URL cannot carry."""
        options = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": self.portal,
            "target": self.iqn,
            "lun": str(self.lun),
            "initiator-name": self.name,
        }
        if self.username:
            options |= {"user": self.username, "password": self.secret}
        return ",".join(f"{key}={value}" for key, value in options.items())

    def with_secret(self, secret: str) -> Self:
        """Return the same with another secret."""
        return replace(self, secret=secret)

    def inquiry(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Log in and send INQUIRY."""
        return _run("iscsi-inq", "-i", self.name, *options, self.url)

    def discover(self) -> subprocess.CompletedProcess[str]:
        """Ask the portal for its targets."""
        account = f"{self.username}%{self.secret}@" if self.username else ""
        return _run("iscsi-ls", "-i", self.name, f"iscsi://{account}{self.portal}")

    def io(self, *commands: str, read_only: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `qemu-io` commands in one session."""
        options = ["-r"] if read_only else []
        steps = [word for command in commands for word in ("-c", command)]
        return _run(
            "qemu-io", "-t", "none", "-d", "unmap", *options, *steps,
            "--image-opts", self.image_options,
        )  # fmt: skip


class Guest:
    """One lasting session that reads and writes what it knows, as a guest would."""

    def __init__(
        self,
        initiator: Initiator,
        timeout_s: float = _COMMAND_TIMEOUT_S,
        *,
        read_only: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        options = ["-r"] if read_only else []
        self._process = subprocess.Popen(
            ["stdbuf", "-o0", "qemu-io", "-t", "none", *options,
             "--image-opts", initiator.image_options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._rounds = 0
        try:
            self._until_prompt("log in")
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise

    def round(self) -> float:
        """Write 4 KiB, flush every eighth time, read back; return the longest wait in seconds."""
        pattern, offset = self._rounds % 255 + 1, self._rounds % 512 * 4096
        waits = [self._do(f"write -P {pattern} {offset} 4096", "wrote 4096/4096")]
        if self._rounds % 8 == 0:
            waits.append(self._do("flush", ""))
        waits.append(self._do(f"read -P {pattern} {offset} 4096", "read 4096/4096"))
        self._rounds += 1
        return max(waits)

    def rounds(self, duration_s: float) -> tuple[int, float]:
        """Repeat `round` for a time; return how many and the longest wait."""
        longest, before, deadline = 0.0, self._rounds, time.monotonic() + duration_s
        while time.monotonic() < deadline:
            longest = max(longest, self.round())
        return self._rounds - before, longest

    def _do(self, command: str, expected: str) -> float:
        """Do one command and check its answer; return the seconds it took."""
        assert self._process.stdin is not None
        started = time.monotonic()
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        text = self._until_prompt(command)
        assert "failed" not in text and "rror" not in text and expected in text, text
        return time.monotonic() - started

    def _until_prompt(self, command: str) -> str:
        assert self._process.stdout is not None
        output = b""
        while not output.endswith(b"qemu-io> "):
            ready, _, _ = select.select([self._process.stdout], [], [], self.timeout_s)
            assert ready, f"{command!r} does not end: {output!r}"
            part = os.read(self._process.stdout.fileno(), 65536)
            assert part, f"qemu-io ended: {output!r}"
            output += part
        return output.decode()

    def kill(self) -> None:
        """End at once, without logging out."""
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        """Log out."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(b"quit\n", timeout=_COMMAND_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()


class BusyGuest:
    """A guest that works in a thread of its own until the end of the block, and must see no error.

    The wait of the round that was longest is in `longest_s`; `reset` begins anew.
    """

    def __init__(self, guest: Guest) -> None:
        self.rounds = 0
        self.longest_s = 0.0
        self._guest = guest
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            while not self._ended.is_set():
                waited_s = self._guest.round()
                self.longest_s = max(self.longest_s, waited_s)  # may have been reset meanwhile
                self.rounds += 1
        except (AssertionError, OSError) as error:
            self._error = error

    def reset(self) -> None:
        """Wait for two whole rounds, then forget the waits so far."""
        self._wait_for_rounds(2)
        self.longest_s = 0.0

    def pause(self) -> float:
        """Wait for two whole rounds more; return the longest wait since `reset`, in seconds."""
        self._wait_for_rounds(2)
        return self.longest_s

    def ended_within(self, duration_s: float) -> bool:
        """Let the guest work for a time; return whether it ended."""
        self._thread.join(duration_s)
        return not self._thread.is_alive()

    def _wait_for_rounds(self, number: int) -> None:
        wanted, deadline = self.rounds + number, time.monotonic() + self._guest.timeout_s
        while self.rounds < wanted:
            if self._error is not None:
                raise self._error
            assert time.monotonic() < deadline, "the guest does not get on"
            time.sleep(0.001)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


@contextlib.contextmanager
def running_tgtd(folder: Path, port: int, *, closed: bool = False) -> Iterator[Path]:
    """Run a private tgtd; give its management socket. `closed`: as the supervisor starts it, which
    leaves the portal to whoever makes its targets."""
    control = folder / "tgtd.0"
    portal = Portal("127.0.0.1", port)
    launch = TargetProcess("tgt", portal, "tgtd", control, folder / "blocks").launch()
    command = launch.command if closed else ["tgtd", "-f", "--iscsi", f"portal={portal}"]
    with (folder / "tgtd.log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **launch.environment}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _accepts(control):
            assert process.poll() is None and time.monotonic() < deadline, "tgtd does not start"
            time.sleep(0.01)
        yield control
        assert process.poll() is None, (folder / "tgtd.log").read_text()
    finally:
        process.kill()
        process.wait()


def server_pid(path: Path) -> int:
    """Return the process that listens on a Unix socket (SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("iII", credentials)[0]
    return pid


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL, timeout=_COMMAND_TIMEOUT_S,
    )  # fmt: skip
