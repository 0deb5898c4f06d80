"""The supervisor: holds the FUSE connection and keeps `blockd`, `tgtd` and the API running.

    python -m stratocache.fs.supervisor --run-dir RUN --state-dir STATE --config-json FILE

Standard library only, one thread, no I/O path of its own. It never opens a file of its own mount
and never waits for one child on behalf of another. `SUPERVISOR.md` has the design.
"""

import argparse
import json
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from stratocache.cache.errors import StratocacheError
from stratocache.fs.fuse_mount import FuseMount, unmount_stale
from stratocache.fs.holder import Holder
from stratocache.fs.poke import poke
from stratocache.fs.pool import Pool
from stratocache.fs.portal import Portal
from stratocache.fs.processes import Child, Launch
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.standby import Standby
from stratocache.fs.target_process import Backend, TargetProcess

log = logging.getLogger(__name__)

READY_LINE = "stratocache: ready"

_POLL_INTERVAL_S = 0.005
_STOP_TIMEOUT_S = 10.0
_SPARE_DELAY_S = 0.5  # guests that waited for blockd need the processors first
_API_DELAY_S = 3.0  # at most, at our own start: nobody's disk waits for the API


@dataclass(frozen=True)
class Settings:
    """What the supervisor needs of the configuration."""

    run_dir: Path
    state_dir: Path
    config_json: Path
    address: str = "127.0.0.1"
    port: int = 3260
    tgtd: str = "tgtd"
    backend: Backend = "tgt"
    log_dir: Path | None = None


class Supervisor:
    """One appliance. `run` returns when it has been asked to stop and everything is taken down.

    `commands` replaces the module of `blockd` (with its first arguments) or the program of `api`.
    `resend=False` recovers as on kernels without FUSE_NOTIFY_RESEND.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        commands: Mapping[str, Sequence[str]] | None = None,
        resend: bool = True,
    ) -> None:
        python = sys.executable
        self._settings = settings
        self._directory = RunDirectory(settings.run_dir)
        lio = settings.backend == "lio"
        self._target = TargetProcess(
            settings.backend,
            Portal(settings.address, settings.port),
            settings.tgtd,
            self._directory.lio_control if lio else self._directory.tgt_control,
            self._directory.blocks,
        )
        self._commands = {
            "blockd": ["stratocache.fs.blockd"],
            "api": [python, "-m", "stratocache.api.server"],
            **(commands or {}),
        }
        self._resend = resend
        self._pool: Pool | None = None
        self._mount: FuseMount | None = None
        self._stopping = False
        self._announced = False
        names = ("holder", "blockd", "tgtd", "api", "spare")
        self._children = {name: Child(name, self._log_file(name)) for name in names}
        self._children["spare"].due_at = math.inf
        self._standby = Standby(
            self._children["blockd"], self._children["spare"], self._commands["blockd"]
        )
        self._holder = Holder(self._children["holder"], self._directory.blocks if lio else None)
        self._launch: dict[str, Callable[[], None]] = {
            "blockd": self._start_blockd,
            "spare": self._start_spare,
            "tgtd": self._start_tgtd,
            "api": self._start_api,
            "holder": self._start_holder,
        }

    def _log_file(self, name: str) -> Path | None:
        program = "blockd" if name == "spare" else name
        return self._settings.log_dir / f"{program}.log" if self._settings.log_dir else None

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT.

        Raises `Conflict` when another instance runs or the portal is taken, `InvalidInput` for a
        directory that cannot be used, `Internal` without FUSE, what `Pool.mount` raises.
        """
        settings, directory = self._settings, self._directory
        directory.prepare(settings.state_dir, settings.log_dir)
        with directory.lock(), self._signals() as wakeup:
            try:
                self._pool = Pool.read(settings.state_dir)
                if self._pool is not None:
                    self._pool.mount()
                self._target.suspend()
                unmount_stale(directory.blocks)
                directory.blocks.mkdir(mode=0o755, exist_ok=True)
                directory.remove_sockets()
                self._target.wait_until_free()
                self._mount = FuseMount(directory.blocks, directory.init_request)
                self._children["api"].due_at = time.monotonic() + _API_DELAY_S
                while not self._stopping:
                    self._start_due()
                    self._wait_for_event(wakeup)
            finally:
                self._take_down()

    @contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Turn SIGTERM and SIGINT into a stop, and make every signal readable on a socket."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        def ignore(number: int, frame: FrameType | None) -> None:
            """Unlike SIG_IGN, not inherited by children."""

        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, stop),
            signal.SIGINT: signal.signal(signal.SIGINT, stop),
            signal.SIGHUP: signal.signal(signal.SIGHUP, ignore),
        }
        wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()

    # -- children

    def _start_due(self) -> None:
        now = time.monotonic()
        for name, child in self._children.items():
            if not child.running and now >= child.due_at:
                try:
                    self._launch[name]()
                except OSError as error:
                    log.error("%s cannot be started: %s", name, error)
                    child.plan_restart()

    def _start_blockd(self) -> None:
        self._children["spare"].due_at = math.inf
        self._standby.start_active(*self._blockd_launch())

    def _start_spare(self) -> None:
        self._standby.start_spare(*self._blockd_launch())

    def _blockd_launch(self) -> tuple[list[str], tuple[int, ...]]:
        """Return the arguments and the inherited descriptors of a `blockd`."""
        assert self._mount is not None
        descriptor = self._mount.descriptor
        config_json = str(self._settings.config_json)
        return ["--config-json", config_json, "--fuse-fd", str(descriptor)], (descriptor,)

    def _start_tgtd(self) -> None:
        if not self._target.can_listen():
            self._children["tgtd"].due_at = time.monotonic() + _POLL_INTERVAL_S
            return
        assert self._mount is not None
        self._children["tgtd"].start(self._target.launch())
        self._holder.hold(self._mount.descriptor, self._children["tgtd"].pidfd)

    def _start_holder(self) -> None:
        self._holder.start()
        tgtd = self._children["tgtd"]
        if tgtd.running and self._mount is not None:
            self._holder.hold(self._mount.descriptor, tgtd.pidfd)

    def _start_api(self) -> None:
        self._children["api"].start(
            Launch([*self._commands["api"], "--config-json", str(self._settings.config_json)])
        )

    def _wait_for_event(self, wakeup: socket.socket) -> None:
        running = [child for child in self._children.values() if child.running]
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        if self._mount is not None:
            poll.register(self._mount.descriptor, 0)  # POLLERR, which always counts: aborted
        for child in running:
            poll.register(child.pidfd, select.POLLIN)
        now = time.monotonic()
        waits = [child.due_at - now for child in self._children.values() if not child.running]
        if any(child.ready_at is None for child in running):
            waits.append(_POLL_INTERVAL_S)
        wait_s = min(waits, default=math.inf)
        timeout_ms = None if wait_s == math.inf else max(0.0, wait_s) * 1000
        happened = {descriptor for descriptor, _ in poll.poll(timeout_ms)}
        if wakeup.fileno() in happened:
            with suppress(BlockingIOError):
                wakeup.recv(4096)
        if self._mount is not None and self._mount.descriptor in happened:
            self._replace_lost_mount()
        for child in running:
            if child.pidfd in happened:
                self._collect(child)
            elif child.running and child.ready_at is None and self._is_ready(child):
                self._note_ready(child)

    def _is_ready(self, child: Child) -> bool:
        if child.name in ("blockd", "spare"):
            return self._standby.is_ready(child)
        if child.name == "tgtd":
            return _answers(self._target.control)
        if child.name == "holder":
            return True
        return _answers(self._directory.api_socket)

    def _note_ready(self, child: Child) -> None:
        child.mark_ready()
        if child.name == "tgtd":
            poke(self._directory.poke_socket)  # it has no targets yet
        if child.name == "blockd":
            self._children["spare"].due_at = time.monotonic() + _SPARE_DELAY_S
            if not self._announced:
                self._children["api"].due_at = 0.0
        if not self._announced and all(
            other.ready_at is not None for name, other in self._children.items() if name != "spare"
        ):
            self._announced = True
            print(READY_LINE, flush=True)
            _notify("READY=1")

    # -- recovery

    def _collect(self, child: Child) -> None:
        child.collect()
        self._standby.forget(child)
        if child.name == "blockd":
            self._recover_connection()

    def _replace_lost_mount(self) -> None:
        """Somebody unmounted or aborted by force: begin anew with a `blockd` of the new mount."""
        blockd = self._children["blockd"]
        if not blockd.running:
            self._recover_connection()
        elif not blockd.wait(0):
            log.error("the FUSE connection was aborted from outside")
            blockd.send(signal.SIGKILL)
            blockd.wait(_STOP_TIMEOUT_S)  # it cannot linger on a connection that is gone

    def _recover_connection(self) -> None:
        """Let the next `blockd` continue the connection, or give it a new one."""
        assert self._mount is not None
        if self._resend and self._mount.can_resend and self._mount.connected:
            try:
                self._mount.resend()
            except OSError as error:
                log.error("the kernel does not send requests again: %s", error)
            else:
                return
        tgtd = self._children["tgtd"]
        suspension = self._target.suspend()
        tgtd.send(signal.SIGKILL)  # first: it must not see the errors of the abort
        self._mount.unmount()
        self._mount = None
        if not tgtd.wait(_STOP_TIMEOUT_S):
            log.error("tgtd does not end; its sessions may see errors")
        suspension.wait(_STOP_TIMEOUT_S)
        unmount_stale(self._directory.blocks)
        self._drop_spare()
        self._mount = FuseMount(self._directory.blocks, self._directory.init_request)

    def _drop_spare(self) -> None:
        """End the spare, which has inherited the connection of the time when it was started."""
        spare = self._children["spare"]
        spare.stop(signal.SIGKILL, _STOP_TIMEOUT_S)
        self._standby.forget(spare)
        spare.due_at = math.inf

    # -- after

    def _take_down(self) -> None:
        """Stop in the order of use: who asks, who serves, who answers, the mount."""
        if self._announced:
            _notify("STOPPING=1")
        children = self._children
        children["api"].stop(signal.SIGTERM, _STOP_TIMEOUT_S)
        children["tgtd"].stop(signal.SIGKILL, _STOP_TIMEOUT_S)  # ignores SIGTERM with targets
        self._target.clear()
        self._drop_spare()
        children["blockd"].stop(signal.SIGTERM, _STOP_TIMEOUT_S)
        if self._mount is not None:
            self._mount.unmount()
            self._mount = None
        self._holder.forget()
        for child in children.values():  # the abort frees one that waited on the mount
            child.stop(signal.SIGKILL, _STOP_TIMEOUT_S)
            self._standby.forget(child)
        if self._pool is not None:
            self._pool.unmount()
        self._directory.remove_sockets()


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


def _notify(state: str) -> None:
    """Tell systemd, if it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        name = "\0" + address[1:] if address.startswith("@") else address
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            suppress(OSError),
        ):
            sender.sendto(state.encode(), name)


def run_reporting(supervisor: Supervisor, log_level: str) -> int:
    """Run as a program does: log to stderr, say what went wrong, return the exit status."""
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    try:
        supervisor.run()
    except StratocacheError as error:
        print(f"stratocache: {error.message}", file=sys.stderr, flush=True)
        return error.exit_status
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the supervisor; return the exit status of the command line's contract."""
    parser = argparse.ArgumentParser(prog="stratocache serve")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path)
    given = parser.parse_args(arguments)
    configuration = json.loads(given.config_json.read_text())
    iscsi = configuration["iscsi"]
    settings = Settings(
        run_dir=given.run_dir.resolve(),
        state_dir=given.state_dir.resolve(),
        config_json=given.config_json.resolve(),
        address=iscsi["address"],
        port=iscsi["port"],
        tgtd=iscsi["tgtd"],
        backend=iscsi["backend"],
        log_dir=given.log_dir,
    )
    return run_reporting(Supervisor(settings), configuration["log_level"])


if __name__ == "__main__":
    sys.exit(main())
