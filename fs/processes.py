"""The supervisor's children: how one is started, watched, ended and started again.

Standard library only. Every child has a session of its own, so that a signal of the terminal does
not reach it before the supervisor decides; dies with the supervisor unless it is told not to; gets
the descriptors it is given and no others; and leaves no descendants of its session behind.
"""

import ctypes
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1

FIRST_DELAY_S = 0.1
DELAY_MAX_S = 5.0
HEALTHY_AFTER_S = 0.1


@dataclass(frozen=True)
class Launch:
    """How to start a child this time."""

    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside the inherited ones."""
    descriptors: tuple[int, ...] = ()
    """Inherited under the same numbers."""
    dies_with_us: bool = True
    """Whether the kernel kills it when we end."""


class Child:
    """One process that is to run, with its restarts.

    The first restart is immediate; when the new process does not stay ready for `HEALTHY_AFTER_S`,
    pauses double from `FIRST_DELAY_S` to `DELAY_MAX_S`.
    """

    def __init__(self, name: str, log_file: Path | None = None) -> None:
        self.name = name
        self.due_at = 0.0
        """Monotonic time before which it is not started."""
        self.ready_at: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self._log_file = log_file
        self._delay_s = 0.0

    @property
    def running(self) -> bool:
        """Whether there is a process, perhaps a dead one that nobody looked after yet."""
        return self.process is not None

    @property
    def pid(self) -> int:
        """The process id; only while running."""
        assert self.process is not None
        return self.process.pid

    def start(self, launch: Launch) -> None:
        """Start the process; raises `OSError` when the program cannot be run."""
        assert self.process is None
        output = None
        if self._log_file is not None:
            output = os.open(
                self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640
            )
        environment = {**os.environ, **launch.environment}
        environment.pop("NOTIFY_SOCKET", None)
        try:
            self.process = subprocess.Popen(
                list(launch.command),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, pass_fds=launch.descriptors, start_new_session=True,
                # safe, as the supervisor has no threads
                preexec_fn=_die_with(os.getpid()) if launch.dies_with_us else None,  # noqa: PLW1509
            )  # fmt: skip
        finally:
            if output is not None:
                os.close(output)
        self.ready_at = None
        self.pidfd = os.pidfd_open(self.process.pid)
        log.info("%s started, pid %d", self.name, self.process.pid)

    def take_over(self, other: "Child") -> None:
        """Make another child's process ours, as if it had been started now."""
        assert self.process is None
        assert other.process is not None
        self.process, self.pidfd, self.ready_at = other.process, other.pidfd, None
        other.process, other.pidfd, other.ready_at = None, -1, None
        log.info("%s goes on as pid %d", self.name, self.process.pid)

    def mark_ready(self) -> None:
        """Note that it does its work."""
        self.ready_at = time.monotonic()
        log.info("%s is ready", self.name)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self.process is not None:
            self.process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended, without collecting it; return whether it has."""
        if self.process is None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def collect(self, level: int = logging.WARNING) -> None:
        """Collect the ended process with what is left of its session, and plan the next start."""
        assert self.process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # while its number cannot be taken again
        status = self.process.wait()
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1
        self.plan_restart()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        log.log(level, "%s ended, %s", self.name, how)

    def plan_restart(self) -> None:
        """Set `due_at` by how well the last start went."""
        now = time.monotonic()
        if self.ready_at is not None and now - self.ready_at >= HEALTHY_AFTER_S:
            self._delay_s = 0.0
        self.ready_at = None
        self.due_at = now + self._delay_s
        self._delay_s = min(max(2 * self._delay_s, FIRST_DELAY_S), DELAY_MAX_S)

    def stop(self, number: signal.Signals, timeout_s: float) -> bool:
        """Ask the process to end, make it after `timeout_s`; return whether it is gone."""
        if self.process is None:
            return True
        self.send(number)
        if not self.wait(timeout_s):
            log.warning("%s does not end within %g s; killing it", self.name, timeout_s)
            self.send(signal.SIGKILL)
            if not self.wait(timeout_s):
                return False
        self.collect(logging.INFO)
        return True


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a child does before exec to end when its parent does (PR_SET_PDEATHSIG).

    Run between fork and exec; safe, as the supervisor has no threads.
    """

    def prepare() -> None:
        if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent:
            os._exit(1)

    return prepare
