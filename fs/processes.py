"""The supervisor's children: how one is started, watched, ended, started again and handed on.

Standard library only. Every child has a session of its own, so that a signal of the terminal does
not reach it before the supervisor decides; dies with the supervisor unless it is told not to; gets
the descriptors it is given and no others; and leaves no descendants of its session behind. It
outlives the supervisor's re-execution (`Child.handed_over`, `Child.resume`).
"""

import ctypes
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stratocache.fs.confinement import Confinement, Prepared

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1

_OOM = Path("/proc/self/oom_score_adj")

FIRST_DELAY_S = 0.1
DELAY_MAX_S = 5.0
HEALTHY_AFTER_S = 0.1
STEADY_AFTER_S = 10.0

# somebody else's decision, which says nothing about the program
_KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


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
    confinement: Confinement | None = None
    """What it may do; None = all that we may."""
    spared: bool = False
    """Not to be killed when the host runs out of memory: guests' writes would be lost with it."""


class Child:
    """One process that is to run, with its restarts.

    The first restart is immediate; when the new process does not stay ready for `HEALTHY_AFTER_S`,
    pauses double from `FIRST_DELAY_S` to `DELAY_MAX_S`.
    """

    def __init__(self, name: str, log_file: Path | None = None) -> None:
        self.name = name
        self.due_at = 0.0
        """Monotonic time before which it is not started."""
        self.held = False
        """Not started at all until somebody changes this."""
        self.pid = 0
        """The process id; 0 without a process."""
        self.pidfd = -1
        self.ready_at: float | None = None
        self.started_at = 0.0
        """Seconds since the epoch."""
        self.restarts = 0
        """Starts after the first."""
        self.pause_s = 0.0
        """From the end of the process before until this one was ready."""
        self.paused_s = 0.0
        """All such pauses together."""
        self.crashes = 0
        """Ends by its own fault since it was last ready for `STEADY_AFTER_S`."""
        self.links: dict[str, int] = {}
        """Our ends of pipes to the process, by name; closed when it is collected."""
        self._log_file = log_file
        self._delay_s = 0.0
        self._ended_at: float | None = None
        self._popen: subprocess.Popen[bytes] | None = None  # None too when it was handed over

    @property
    def running(self) -> bool:
        """Whether there is a process, perhaps a dead one that nobody looked after yet."""
        return self.pid != 0

    @property
    def ready(self) -> bool:
        """Whether it does its work, as far as we know."""
        return self.ready_at is not None

    def start(self, launch: Launch, links: Mapping[str, int] | None = None) -> None:
        """Start the process, with our ends of its pipes.

        Raises `OSError` when the program cannot be run; `links` are the caller's then.
        """
        assert not self.running
        output = None
        if self._log_file is not None:
            output = os.open(
                self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640
            )
        environment = {**os.environ, **launch.environment}
        environment.pop("NOTIFY_SOCKET", None)
        confined = launch.confinement.prepare() if launch.confinement is not None else None
        try:
            self._popen = subprocess.Popen(
                list(launch.command),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, pass_fds=launch.descriptors, start_new_session=True,
                # safe, as the supervisor has no threads
                preexec_fn=_preparation(launch, confined),  # noqa: PLW1509
            )  # fmt: skip
        finally:
            if output is not None:
                os.close(output)
            if confined is not None:
                confined.close()
        self._begin(self._popen.pid, os.pidfd_open(self._popen.pid), links or {})
        log.info("%s started, pid %d", self.name, self.pid)

    def _begin(self, pid: int, pidfd: int, links: Mapping[str, int]) -> None:
        self.pid, self.pidfd, self.links, self.ready_at = pid, pidfd, dict(links), None
        self.restarts += self.started_at > 0
        self.started_at = time.time()

    def take_over(self, other: "Child") -> None:
        """Make another child's process ours, as if it had been started now."""
        assert not self.running
        assert other.running
        self._popen = other._popen
        self._begin(other.pid, other.pidfd, other.links)
        other._forget()
        log.info("%s goes on as pid %d", self.name, self.pid)

    def _forget(self) -> None:
        self._popen, self.pid, self.pidfd, self.links, self.ready_at = None, 0, -1, {}, None

    def handed_over(self) -> dict[str, Any]:
        """Return what `resume` needs after a re-execution, as JSON."""
        return {
            "pid": self.pid,
            "pidfd": self.pidfd,
            "links": self.links,
            "ready_at": self.ready_at,
            "started_at": self.started_at,
            "restarts": self.restarts,
            "pause_s": self.pause_s,
            "paused_s": self.paused_s,
        }

    def resume(self, handed: Mapping[str, Any]) -> None:
        """Go on with the process that our predecessor of the same process id has started."""
        self.pid, self.pidfd = handed["pid"], handed["pidfd"]
        self.links = dict(handed["links"])
        self.ready_at = handed["ready_at"]
        self.started_at, self.restarts = handed["started_at"], handed["restarts"]
        # an older version hands over neither
        self.pause_s, self.paused_s = handed.get("pause_s", 0.0), handed.get("paused_s", 0.0)

    @property
    def descriptors(self) -> list[int]:
        """What must stay open for `resume`."""
        return [self.pidfd, *self.links.values()] if self.running else []

    def close_link(self, name: str) -> None:
        """Close our end of one of its pipes, if it is open."""
        if name in self.links:
            os.close(self.links.pop(name))

    def mark_ready(self) -> None:
        """Note that it does its work."""
        self.ready_at = time.monotonic()
        if self._ended_at is not None:
            self.pause_s = self.ready_at - self._ended_at
            self.paused_s += self.pause_s
            self._ended_at = None
        log.info("%s is ready", self.name)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self.running:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended, without collecting it; return whether it has."""
        if not self.running:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def collect(self, level: int = logging.WARNING) -> int:
        """Collect the ended process with what is left of its session, and plan the next start.

        Returns its status, or its signal's number below zero.
        """
        assert self.running
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # while its number cannot be taken again
        if self._popen is not None:
            status = self._popen.wait()
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for descriptor in (self.pidfd, *self.links.values()):
            os.close(descriptor)
        if self.ready_at is not None and time.monotonic() - self.ready_at >= STEADY_AFTER_S:
            self.crashes = 0
        self.crashes += status != 0 and status not in _KILLED
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        self.plan_restart()
        self._forget()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        log.log(level, "%s ended, %s", self.name, how)
        return status

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
        if not self.running:
            return True
        self.send(number)
        if not self.wait(timeout_s):
            log.warning("%s does not end within %g s; killing it", self.name, timeout_s)
            self.send(signal.SIGKILL)
            if not self.wait(timeout_s):
                return False
        self.collect(logging.INFO)
        return True


def _preparation(launch: Launch, confined: Prepared | None) -> Callable[[], None]:
    """Return what a child does between fork and exec; safe, as the supervisor has no threads.

    It ends when its parent does (PR_SET_PDEATHSIG), and gives up what it does not need.
    """
    parent = os.getpid()

    def prepare() -> None:
        if launch.dies_with_us and (
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent
        ):
            os._exit(1)
        if launch.spared:
            with suppress(OSError):  # not ours to say, as in a container
                _OOM.write_bytes(b"-1000")
        if confined is not None and not confined.enter():
            os.write(2, b"this process cannot be confined\n")
            os._exit(1)

    return prepare
