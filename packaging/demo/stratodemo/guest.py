"""One QEMU guest of the demonstration image: started, told what to do, listened to, always ended.

The guest runs a shell script that the host passes in (see `system/init`) and answers on its serial
console with lines `STRATO key=value`; the script's exit status comes as `exit`, then the machine
powers itself off.
"""

import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_REPORT = re.compile(r"STRATO (?P<key>[a-z0-9_-]+)=(?P<value>.*)")
# Software emulation only: a /dev/kvm that exists need not work.
_MACHINE = (
    "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", "1",
    "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
)  # fmt: skip
_KILL_TIMEOUT_S = 10.0


class GuestError(Exception):
    """A guest did not do what was waited for; the message ends with its last console lines."""


@dataclass(frozen=True)
class ConsoleLine:
    """One line of the serial console and when it was complete, in seconds after the start."""

    at_s: float
    text: str


class Guest:
    """A virtual machine, as a context manager: leaving the block kills it if it still runs.

    `drive_arguments` are QEMU's arguments for all disks (one with `bootindex=1`); `script` is run
    by the guest as process 1's child with the words of `system/stratocache.sh`.
    """

    def __init__(
        self,
        drive_arguments: Sequence[str],
        script: str,
        *,
        name: str = "guest",
        memory_mib: int = 256,
    ) -> None:
        self.name = name
        self._arguments = [*_MACHINE, "-name", name, "-m", str(memory_mib), *drive_arguments]
        self._script = script
        self._lines: list[ConsoleLine] = []
        self._news = threading.Condition()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.started_s = 0.0
        """When QEMU was started, by time.monotonic(); the console's times count from there."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="guest-")
        script = Path(self._folder.name) / "script"
        script.write_text(self._script)
        passed = ["-fw_cfg", f"name=opt/stratocache/script,file={script}"]
        try:
            self._process = subprocess.Popen(
                [*self._arguments, *passed],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError:
            self._folder.cleanup()
            raise
        self.started_s = time.monotonic()
        self._reader = threading.Thread(target=self._read_console, name=self.name, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running.pid

    @property
    def console(self) -> list[ConsoleLine]:
        """Every console line so far (QEMU's own complaints are among them)."""
        with self._news:
            return list(self._lines)

    @property
    def reports(self) -> dict[str, str]:
        """What the guest reported so far; of a key reported twice, the later value."""
        found = (_REPORT.search(line.text) for line in self.console)
        return {match["key"]: match["value"] for match in found if match}

    def wait_for(self, key: str, timeout_s: float) -> str:
        """Wait until the guest reports `key` and return its value.

        Raises `GuestError` when the time is over or the machine ends without that report.
        """
        return self._wait_for_report(key, timeout_s)[1]

    def report_time(self, key: str, timeout_s: float) -> float:
        """Wait like `wait_for`; return when the report came, in seconds after the start."""
        return self._wait_for_report(key, timeout_s)[0]

    def line_time(self, text: str, timeout_s: float) -> float:
        """Wait until a console line has `text`; return when that came, in seconds after the start.

        For guests of other images, which do not report. Raises `GuestError` as `wait_for` does.
        """
        return self._wait(lambda line: line.text if text in line.text else None, text, timeout_s)[0]

    def send(self, line: str) -> None:
        """Type `line` on the serial console; the script gets it with `read`."""
        stdin = self._running.stdin
        assert stdin is not None
        stdin.write(line.encode() + b"\n")
        stdin.flush()

    def finish(self, timeout_s: float) -> dict[str, str]:
        """Wait for the power-off and return all reports.

        Raises `GuestError` when the time is over, QEMU fails, or the script's status is not 0.
        """
        try:
            status = self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failure(f"still runs after {timeout_s:g} s") from None
        self._join_reader()
        if status != 0:
            raise self._failure(f"QEMU ended with status {status}")
        reports = self.reports
        if reports.get("exit") != "0":
            raise self._failure(f"the guest's script ended with {reports.get('exit', 'no status')}")
        return reports

    def kill(self) -> None:
        """End QEMU at once, as a power cut of the virtual machine; harmless when it has ended."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(_KILL_TIMEOUT_S)
        self._join_reader()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "use the guest as a context manager"
        return self._process

    def _wait_for_report(self, key: str, timeout_s: float) -> tuple[float, str]:
        def value(line: ConsoleLine) -> str | None:
            match = _REPORT.search(line.text)
            return match["value"] if match and match["key"] == key else None

        return self._wait(value, key, timeout_s)

    def _wait(
        self, find: Callable[[ConsoleLine], str | None], what: str, timeout_s: float
    ) -> tuple[float, str]:
        """Return when the first line came of which `find` returns something, and what that is."""
        deadline = time.monotonic() + timeout_s
        checked = 0
        with self._news:
            while True:
                for line in self._lines[checked:]:
                    found = find(line)
                    if found is not None:
                        return line.at_s, found
                checked = len(self._lines)
                if self._closed:
                    raise self._failure(f"ended without reporting {what}")
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise self._failure(f"did not report {what} within {timeout_s:g} s")
                self._news.wait(remaining_s)

    def _read_console(self) -> None:
        assert self._running.stdout is not None
        for raw in self._running.stdout:
            line = ConsoleLine(
                time.monotonic() - self.started_s,
                raw.decode(errors="replace").rstrip("\r\n"),
            )
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _join_reader(self) -> None:
        assert self._reader is not None
        self._reader.join(_KILL_TIMEOUT_S)

    def _failure(self, what: str) -> GuestError:
        # Called with and without the lock held: reads the list without it, appends are atomic.
        tail = "\n".join(f"  {line.at_s:7.2f} s  {line.text}" for line in self._lines[-15:])
        return GuestError(f"{self.name}: {what}. Its console ended with:\n{tail}")
