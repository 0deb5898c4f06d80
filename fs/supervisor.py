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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from stratocache import __version__
from stratocache.cache.errors import StratocacheError
from stratocache.cache.structured_log import LogFormat, configure_log
from stratocache.fs import handover
from stratocache.fs.confinement import configured_paths
from stratocache.fs.crew import Crew, Settings
from stratocache.fs.listener import listen, listens_at
from stratocache.fs.mount_keeper import STORED_AS, MountKeeper
from stratocache.fs.poke import poke
from stratocache.fs.pool import Pool
from stratocache.fs.processes import Child
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.service_manager import ServiceManager, stored_descriptors
from stratocache.fs.supervisor_status import State, SupervisorStatus, write_status
from stratocache.fs.upgrading import Upgrading

log = logging.getLogger(__name__)

READY_LINE = "stratocache: ready"
CRASHES_MAX = 10
"""So many crashes of `blockd`, never ready for `processes.STEADY_AFTER_S`: it is given up."""

_SPARE_DELAY_S = 0.5  # guests that waited for blockd need the processors first
_API_DELAY_S = 3.0  # at most, at our own start: nobody's disk waits for the API
_UPGRADE_INTERVAL_S = 0.02
_STORED_API = "api"


class Supervisor:
    """One appliance. `run` returns when it has been asked to stop and everything is taken down.

    `commands` as `Crew` has them. `resend=False` recovers as on kernels without FUSE_NOTIFY_RESEND.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        commands: Mapping[str, Sequence[str]] | None = None,
        resend: bool = True,
    ) -> None:
        self._settings = settings
        self._directory = RunDirectory(settings.run_dir)
        self._crew = Crew(settings, commands or {})
        self._manager = ServiceManager()
        self._keeper = MountKeeper(self._crew, self._directory, self._manager, resend=resend)
        self._pool: Pool | None = None
        self._lock = -1
        self._stopping = False
        self._announced = False
        self._fault = ""
        self._upgrading = Upgrading(
            self._crew, self._directory.upgrade_request, settings.config_json
        )
        self._said = ""

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT.

        Raises `Conflict` when another instance runs or the portal is taken, `InvalidInput` for a
        directory that cannot be used, `Internal` without FUSE, what `Pool.mount` raises.
        """
        settings, directory = self._settings, self._directory
        handed = handover.receive()
        stored = stored_descriptors()
        directory.prepare(settings.state_dir, settings.log_dir)
        inherited = None if handed is None else handover.own(handed["lock"])
        with directory.lock(inherited) as self._lock, self._signals() as wakeup:
            try:
                if handed is not None:
                    self._resume(handed)
                else:
                    self._begin(stored)
                while not self._stopping:
                    self._crew.start_due()
                    self._write_status()
                    self._wait_for_event(wakeup)
                    if self._upgrading.advance():
                        self._become_new_code()
            finally:
                self._take_down()

    @contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Turn SIGTERM and SIGINT into a stop, SIGHUP into an upgrade, and make every signal
        readable on a socket."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        def upgrade(number: int, frame: FrameType | None) -> None:
            self._upgrading.asked = True

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: upgrade}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handover.release_signals()
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()

    # -- beginnings

    def _begin(self, stored: Mapping[str, int]) -> None:
        """Start with nothing, or with what the service manager kept of a killed predecessor."""
        directory = self._directory
        self._pool = Pool.read(self._settings.state_dir)
        if self._pool is not None:
            self._pool.mount()
        directory.remove_leftovers()
        self._keeper.begin(stored.get(STORED_AS))
        self._crew.listener = self._stored_listener(stored.get(_STORED_API)) or listen(
            directory.api_socket, self._settings.group
        )
        self._manager.store(_STORED_API, self._crew.listener.fileno())
        for server in self._crew.networked:
            server.take(stored)
            if server.wanted:
                with suppress(OSError):  # said, and tried again, when it is to be served
                    server.listen()
            server.store(self._manager)
        for child in self._crew.asking:
            child.due_at = time.monotonic() + _API_DELAY_S

    def _stored_listener(self, descriptor: int | None) -> socket.socket | None:
        if descriptor is None:
            return None
        if not listens_at(descriptor, self._directory.api_socket):
            os.close(descriptor)
            return None
        return socket.socket(fileno=descriptor)

    def _resume(self, handed: Mapping[str, Any]) -> None:
        """Go on after our own re-execution, and let the new code take over from there."""
        self._pool = Pool.read(self._settings.state_dir)
        self._keeper.resume(handover.own(handed["fuse"]))
        self._crew.listener = socket.socket(fileno=handover.own(handed["listener"]))
        for server in self._crew.networked:
            server.resume(handed)
        self._crew.resume(handed["children"])
        self._announced = handed["announced"]
        self._upgrading.resume(handed, lambda: self._fault)
        self._manager.notify("STATUS=")  # of whatever was wrong before
        log.info("version %s goes on as pid %d", __version__, os.getpid())

    # -- events

    def _wait_for_event(self, wakeup: socket.socket) -> None:
        running, mount = self._crew.running, self._crew.mount
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        if mount is not None:
            poll.register(mount.descriptor, 0)  # POLLERR, which always counts: aborted
        for child in running:
            poll.register(child.pidfd, select.POLLIN)
        for reports in self._crew.awaited_reports:
            poll.register(reports, select.POLLIN)
        wait_s = self._crew.wait_s()
        if self._upgrading.active:
            wait_s = min(wait_s, _UPGRADE_INTERVAL_S)
        happened = {fd for fd, _ in poll.poll(None if wait_s == math.inf else wait_s * 1000)}
        if wakeup.fileno() in happened:
            with suppress(BlockingIOError):
                wakeup.recv(4096)
        if mount is not None and mount.descriptor in happened:
            self._keeper.replace_lost()
        for child in running:
            if child.pidfd in happened:
                self._collect(child)
            elif child.running and not child.ready and self._crew.is_ready(child):
                self._note_ready(child)

    def _note_ready(self, child: Child) -> None:
        crew = self._crew
        child.mark_ready()
        if child is crew.tgtd:
            poke(self._directory.poke_socket)  # it has no targets yet
        if child is crew.blockd:
            crew.spare.due_at = time.monotonic() + _SPARE_DELAY_S
            if not self._announced:
                for asking in crew.asking:
                    asking.due_at = 0.0
        for server in crew.networked:
            if child is server.child:
                server.store(self._manager)
        if not self._announced and crew.ready:
            print(READY_LINE, flush=True)
            self._announce()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            self._manager.notify("READY=1")

    def _collect(self, child: Child) -> None:
        child.collect()
        if child is self._crew.blockd:
            self._keeper.recover()
            if child.crashes >= CRASHES_MAX:
                self._freeze()

    def _freeze(self) -> None:
        """Give `blockd` up: guests wait, nobody gets an error, everything else goes on."""
        self._fault = (
            f"blockd has crashed {CRASHES_MAX} times and is not started any more; guests wait. "
            "See the log, install a version that works, and run `stratocache upgrade`."
        )
        log.critical("%s", self._fault)
        self._crew.blockd.held = True
        self._crew.drop_spare()
        self._crew.api.due_at = 0.0
        self._manager.notify(f"STATUS=Frozen: {self._fault}")
        self._announce()

    def _become_new_code(self) -> None:
        """Execute the new code, with everything that lives; stay as we are when that fails."""
        crew = self._crew
        assert crew.mount is not None
        assert crew.listener is not None
        crew.drop_spare()
        handover.hold_signals()
        if not self._stopping:
            listeners = {
                name: descriptor
                for server in crew.networked
                for name, descriptor in server.handed_over().items()
            }
            state = {
                "lock": self._lock,
                "fuse": crew.mount.descriptor,
                "listener": crew.listener.fileno(),
                **listeners,
                "children": crew.handed_over(),
                "announced": self._announced,
                "asked": self._upgrading.asked,
            }
            ours = [self._lock, crew.mount.descriptor, crew.listener.fileno(), *listeners.values()]
            self._upgrading.execute(state, [*ours, *crew.descriptors])
            crew.spare.due_at = 0.0
        handover.release_signals()

    def _write_status(self) -> None:
        if self._upgrading.active:
            state = State.UPGRADING
        elif self._fault:
            state = State.FROZEN
        else:
            state = State.READY if self._crew.ready else State.STARTING
        status = SupervisorStatus(
            __version__,
            os.getpid(),
            state,
            self._fault,
            self._crew.status(),
            self._upgrading.record,
        )
        said = status.to_json()
        if said != self._said:
            self._said = said
            try:
                write_status(self._directory.supervisor_status, said)
            except OSError as error:
                log.error("%s cannot be written: %s", self._directory.supervisor_status, error)

    # -- after

    def _take_down(self) -> None:
        """Stop in the order of use: who asks, who serves, who answers, the mount."""
        if self._announced:
            self._manager.notify("STOPPING=1")
        self._manager.remove(_STORED_API)
        crew = self._crew
        for server in crew.networked:
            self._manager.remove(server.name)
        crew.stop_asking()
        self._keeper.end()
        crew.stop_all()  # the abort frees one that waited on the mount
        if crew.listener is not None:
            crew.listener.close()
            self._directory.api_socket.unlink(missing_ok=True)
        for server in crew.networked:
            server.close()
        if self._pool is not None:
            self._pool.unmount()
        self._directory.remove_leftovers()


def run_reporting(supervisor: Supervisor, log_level: str, form: LogFormat = "text") -> int:
    """Run as a program does: log to stderr, say what went wrong, return the exit status."""
    configure_log("supervisor", log_level, form)
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
    api, peers = configuration["api"], configuration.get("peers", {})  # older versions wrote less
    settings = Settings(
        run_dir=given.run_dir.resolve(),
        state_dir=given.state_dir.resolve(),
        config_json=given.config_json.resolve(),
        address=iscsi["address"],
        port=iscsi["port"],
        tgtd=iscsi["tgtd"],
        backend=iscsi["backend"],
        group=api["group"],
        log_dir=given.log_dir,
        peers_address=peers.get("listen", ""),
        peers_port=peers.get("port", 0),
        web_address=api.get("address", ""),
        web_port=api.get("port", 0),
        configured_paths=configured_paths(configuration),
    )
    form = configuration.get("log", {}).get("format", "text")
    return run_reporting(Supervisor(settings), configuration["log_level"], form)


if __name__ == "__main__":
    sys.exit(main())
