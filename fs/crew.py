"""The processes of one appliance: how each is started, and when it is ready.

Standard library only. `Supervisor` decides when; this knows how.
"""

import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stratocache.fs.fuse_mount import FuseMount
from stratocache.fs.handover import own
from stratocache.fs.holder import Holder
from stratocache.fs.network_server import NetworkServer
from stratocache.fs.portal import Portal
from stratocache.fs.privileges import Privileges
from stratocache.fs.processes import Child, Launch
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.standby import REPORTS_LINK, Standby, reports
from stratocache.fs.supervisor_status import ChildStatus
from stratocache.fs.target_process import Backend, TargetProcess

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0

_POLL_INTERVAL_S = 0.005


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
    group: str = "stratocache"
    log_dir: Path | None = None
    peers_address: str = ""
    """Where peers are served; empty = nowhere."""
    peers_port: int = 0
    web_address: str = ""
    """Where people and programs of the network are served; empty = nowhere."""
    web_port: int = 0
    configured_paths: tuple[str, ...] = ()
    """Folders of files that the configuration names; children may read them."""


class Crew:
    """The children of one supervisor. `mount` and `listener` are set before any is started.

    `commands` replaces the module of `blockd` (with its first arguments) or the programs of `api`,
    `peers` and `web`.
    """

    mount: FuseMount | None = None
    listener: socket.socket | None = None

    def __init__(self, settings: Settings, commands: Mapping[str, Sequence[str]]) -> None:
        self._settings = settings
        self._directory = RunDirectory(settings.run_dir)
        self._privileges = Privileges(
            settings.state_dir, settings.run_dir, settings.port, settings.configured_paths
        )
        lio = settings.backend == "lio"
        self.target = TargetProcess(
            settings.backend,
            Portal(settings.address, settings.port),
            settings.tgtd,
            self._directory.lio_control if lio else self._directory.tgt_control,
            self._directory.blocks,
        )
        self._api_command = commands.get(
            "api", [sys.executable, "-m", "stratocache.api.server"]
        )  # fmt: skip
        self.holder = Child("holder", self._log_file("holder"))
        self.blockd = Child("blockd", self._log_file("blockd"))
        self.tgtd = Child("tgtd", self._log_file("tgtd"))
        self.api = Child("api", self._log_file("api"))
        self.networked = tuple(
            NetworkServer(
                Child(name, self._log_file(name)),
                commands.get(name, [sys.executable, "-m", module]),
                *addresses,
            )
            for name, module, addresses in (
                ("peers", "stratocache.api.peer_server",
                 (settings.peers_address, settings.peers_port)),
                ("web", "stratocache.api.web_server", (settings.web_address, settings.web_port)),
            )
        )  # fmt: skip
        """Servers of the network, wanted or not."""
        self.spare = Child("spare", self._log_file("blockd"))
        self.spare.due_at = math.inf
        self._standby = Standby(
            self.blockd,
            self.spare,
            commands.get("blockd", ["stratocache.fs.blockd"]),
            self._privileges.of_blockd(),
        )
        # one that suspends the kernel's targets needs all that we have
        self._holder = (
            Holder(self.holder, None, self._directory.blocks)
            if lio
            else Holder(self.holder, self._privileges.of_holder())
        )
        wanted = [server for server in self.networked if server.wanted]
        self.asking: tuple[Child, ...] = (self.api, *(server.child for server in wanted))
        """Who reads and writes the state beside `blockd`."""
        self.children = (self.holder, self.blockd, self.tgtd, *self.asking, self.spare)
        self._launch: dict[Child, Callable[[], None]] = {
            self.holder: self._start_holder,
            self.blockd: self._start_blockd,
            self.tgtd: self._start_tgtd,
            self.api: self._start_api,
            self.spare: self._start_spare,
            **{server.child: partial(self._start_networked, server) for server in self.networked},
        }

    def _log_file(self, program: str) -> Path | None:
        return self._settings.log_dir / f"{program}.log" if self._settings.log_dir else None

    @property
    def running(self) -> list[Child]:
        """The children that have a process."""
        return [child for child in self.children if child.running]

    @property
    def ready(self) -> bool:
        """Whether everybody does what guests and clients wait for."""
        return self.blockd.ready and self.tgtd.ready and self.api.ready

    def start_due(self) -> None:
        """Start whoever is due; one that cannot be started is tried again later."""
        now = time.monotonic()
        for child in self.children:
            if not child.running and not child.held and now >= child.due_at:
                try:
                    self._launch[child]()
                except OSError as error:
                    log.error("%s cannot be started: %s", child.name, error)
                    child.plan_restart()

    def wait_s(self) -> float:
        """Return the seconds until something has to be looked at, should nothing happen before."""
        if any(not child.ready and REPORTS_LINK not in child.links for child in self.running):
            return _POLL_INTERVAL_S
        due = [c.due_at for c in self.children if not c.running and not c.held]
        return max(0.0, min(due, default=math.inf) - time.monotonic())

    @property
    def awaited_reports(self) -> list[int]:
        """The pipes on which children that are not ready will say so."""
        awaited = [child for child in self.running if not child.ready]
        return [child.links[REPORTS_LINK] for child in awaited if REPORTS_LINK in child.links]

    def is_ready(self, child: Child) -> bool:
        """Look whether a running child, which was not ready, is."""
        if child in (self.blockd, self.spare):
            return self._standby.is_ready(child)
        if child is self.tgtd:
            return _answers(self.target.control)
        if child in self.asking:
            return bool(reports(child))
        return True

    def drop_spare(self) -> None:
        """End the spare, and start none until it is due; it has the connection and the code of the
        time when it was started."""
        self.spare.stop(signal.SIGKILL, STOP_TIMEOUT_S)
        self.spare.due_at = math.inf

    def stop_asking(self) -> None:
        """End who asks of `blockd`, then who serves, then `blockd` itself."""
        for child in self.asking:
            child.stop(signal.SIGTERM, STOP_TIMEOUT_S)
        self.tgtd.stop(signal.SIGKILL, STOP_TIMEOUT_S)  # ignores SIGTERM with targets
        self.target.clear()
        self.drop_spare()
        self.blockd.stop(signal.SIGTERM, STOP_TIMEOUT_S)

    def stop_all(self) -> None:
        """End whoever is left, when there is no connection any more that one could wait on."""
        self._holder.forget()
        for child in self.children:
            child.stop(signal.SIGKILL, STOP_TIMEOUT_S)

    # -- how each is started

    def _start_holder(self) -> None:
        self._holder.start()
        if self.tgtd.running and self.mount is not None:
            self._holder.hold(self.mount.descriptor, self.tgtd.pidfd)

    def _start_blockd(self) -> None:
        self.spare.due_at = math.inf
        self._standby.start_active(*self._blockd_launch())

    def _start_spare(self) -> None:
        self._standby.start_spare(*self._blockd_launch())

    def _blockd_launch(self) -> tuple[list[str], tuple[int, ...]]:
        """Return the arguments and the inherited descriptors of a `blockd`."""
        assert self.mount is not None
        descriptor = self.mount.descriptor
        config_json = str(self._settings.config_json)
        return ["--config-json", config_json, "--fuse-fd", str(descriptor)], (descriptor,)

    def _start_tgtd(self) -> None:
        if not self.target.can_listen():
            self.tgtd.due_at = time.monotonic() + _POLL_INTERVAL_S
            return
        assert self.mount is not None
        launch = self.target.launch()
        if self._settings.backend == "tgt":  # who makes the kernel's targets needs all that we have
            launch = replace(launch, confinement=self._privileges.of_tgtd(), spared=True)
        self.tgtd.start(launch)
        self._holder.hold(self.mount.descriptor, self.tgtd.pidfd)

    def _start_api(self) -> None:
        assert self.listener is not None
        self._start_server(self.api, self._api_command, self.listener)

    def _start_networked(self, server: NetworkServer) -> None:
        self._start_server(server.child, server.command, server.listen())

    def _start_server(self, child: Child, command: Sequence[str], listening: socket.socket) -> None:
        """Start a server on a socket of ours, with a pipe on which it says that it serves."""
        listener = listening.fileno()
        ours, ready = os.pipe2(os.O_CLOEXEC)
        arguments = [
            "--config-json", str(self._settings.config_json),
            "--listen-fd", str(listener), "--ready-fd", str(ready),
        ]  # fmt: skip
        launch = Launch(
            [*command, *arguments], descriptors=(listener, ready),
            confinement=self._privileges.of_server(child.name),
        )  # fmt: skip
        try:
            child.start(launch, {REPORTS_LINK: ours})
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(ready)

    # -- for who comes after us, and for others

    def handed_over(self) -> dict[str, Any]:
        """Return what `resume` needs after a re-execution, as JSON."""
        return {child.name: child.handed_over() for child in self.running}

    @property
    def descriptors(self) -> Iterable[int]:
        """What must stay open for `resume`."""
        return [descriptor for child in self.running for descriptor in child.descriptors]

    def resume(self, handed: Mapping[str, Any]) -> None:
        """Go on with the processes that our predecessor of the same process id has started."""
        for child in self.children:
            if child.name in handed:
                child.resume(handed[child.name])
                for descriptor in child.descriptors:
                    own(descriptor)

    def status(self) -> dict[str, ChildStatus]:
        """Return what others may know of each."""
        return {
            child.name: ChildStatus(
                child.pid,
                child.started_at,
                child.restarts,
                child.ready,
                round(child.pause_s, 4),
                round(child.paused_s, 4),
            )
            for child in self.children
        }


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True
