"""The real supervisor with a small `blockd` and API, in directories of its own.

As a program: the supervisor with those children, which its command line cannot ask for.
"""

import argparse
import contextlib
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from stratocache.cache.configuration import Configuration
from stratocache.fs import portal, processes
from stratocache.fs.crew import Settings
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.supervisor import READY_LINE, Supervisor, run_reporting
from stratocache.fs.supervisor_status import SupervisorStatus, read_status
from stratocache.fs.upgrade import UpgradeRecord, UpgradeRequest
from support.fuse_child import DISK_BYTES, export
from support.iscsi import Initiator, free_port
from support.service_manager import ServiceManager

START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 40
UPGRADE_TIMEOUT_S = 240
_HASTE_S = 0.2
_PYTHON = sys.executable
FUSE_CHILD = ("support.fuse_child",)
API_CHILD = (_PYTHON, "-m", "support.supervised", "--as-api")
PEERS_CHILD = (_PYTHON, "-m", "support.supervised", "--as-peers")
WEB_CHILD = (_PYTHON, "-m", "support.supervised", "--as-web")


class Supervised:
    """One supervisor; a context manager that starts it and leaves nothing behind."""

    def __init__(
        self, root: Path, *, export: bool = False, resend: bool = True, api: str = "normal",
        peers: bool = False, web: bool = False, hasty: bool = False,
    ) -> None:  # fmt: skip
        self.state_dir = root / "state"
        self.directory = RunDirectory(root / "run")
        self.port = free_port()
        self.peers_port = free_port() if peers else 0
        self.web_port = free_port() if web else 0
        self.log = root / "log"
        self.config_json = root / "configuration.json"
        self._options = [
            *(["--export"] if export else []),
            *([] if resend else ["--no-resend"]),
            *(["--hasty"] if hasty else []),
            *("--api", api),
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.manager: ServiceManager | None = None
        self.state_dir.mkdir()
        with (self.state_dir / "disk").open("wb") as disk:
            disk.truncate(DISK_BYTES)
        configuration = Configuration.model_validate(
            {
                "state_dir": self.state_dir,
                "run_dir": self.directory.path,
                "iscsi": {"port": self.port},
                "peers": {"listen": "127.0.0.1", "port": self.peers_port} if peers else {},
                "api": {"address": "127.0.0.1", "port": self.web_port} if web else {},
            }
        )
        self.config_json.write_text(configuration.model_dump_json())

    @property
    def disk(self) -> Path:
        """The writable file of the mount. Touch it from other processes only."""
        return self.directory.blocks / "disk"

    def begin(self) -> None:
        """Start the supervisor and return at once."""
        command = [
            _PYTHON, "-m", "support.supervised", "--config-json", str(self.config_json),
            *self._options,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self.environment}
        with self.log.open("ab") as log:
            if self.manager is not None:
                self.process = self.manager.start(command, environment, log)
                return
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def start(self) -> None:
        """Start the supervisor and return when it says that it is ready."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        self.begin()
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY_LINE not in self.log.read_text()[offset:]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def tail(self) -> str:
        """Return the end of the log, for messages."""
        return self.log.read_text()[-4000:]

    def child(self, name: str) -> int:
        """Return the process id of a child, waiting until there is one."""
        texts = {
            "blockd": "support.fuse_child",
            "tgtd": "tgtd",
            "api": "--as-api",
            "peers": "--as-peers",
            "web": "--as-web",
            "holder": "stratocache.fs.holder",
        }
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for pid, words in self.children().items():
                if texts[name] in words and _command_name(pid) != "standby":
                    return pid
            time.sleep(0.005)
        raise AssertionError(f"no {name}:\n{self.tail()}")

    def children(self) -> dict[int, list[str]]:
        """Return the children that live, with their command lines."""
        assert self.process is not None
        found = {}
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in map(int, tasks.read_text().split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                if line:
                    found[pid] = line.split("\0")
        return found

    def kill(self, name: str) -> float:
        """Kill a child; return the seconds until another runs in its place."""
        pid = self.child(name)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while self.child(name) == pid:
            time.sleep(0.001)
        return time.monotonic() - started

    def connect(self) -> socket.socket:
        """Connect to the API, which says its process id when it answers."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(START_TIMEOUT_S)
        client.connect(str(self.directory.api_socket))
        return client

    def connect_as_peer(self) -> socket.socket:
        """Connect to what serves peers, which says its process id when it answers."""
        return socket.create_connection(("127.0.0.1", self.peers_port), timeout=START_TIMEOUT_S)

    def connect_as_web(self) -> socket.socket:
        """Connect to what serves the network, which says its process id when it answers."""
        return socket.create_connection(("127.0.0.1", self.web_port), timeout=START_TIMEOUT_S)

    def status(self) -> SupervisorStatus | None:
        """Return what the supervisor says about itself."""
        return read_status(self.directory.supervisor_status)

    def upgrade(self, request: UpgradeRequest | None = None) -> UpgradeRecord:
        """Ask for an upgrade to this code, or as a request says; return what became of it."""
        assert self.process is not None
        request = request or upgrade_request()
        request.write(self.directory.upgrade_request)
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + UPGRADE_TIMEOUT_S
        while True:
            status = self.status()
            if status is not None and status.upgrade is not None:
                record = status.upgrade
                if record.id == request.id and record.finished:
                    return record
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def wait(self) -> int:
        """Wait for the end of the supervisor; return its status."""
        assert self.process is not None
        status = self.process.wait(STOP_TIMEOUT_S)
        self.process = None
        return status

    def stop(self) -> int:
        """Ask the supervisor to stop; return its status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def mounts(self) -> int:
        """Return how many file systems are mounted at our mount point."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines].count(str(self.directory.blocks))

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def _clean(self) -> None:
        try:
            if self.process is not None:
                self.stop()
        finally:
            if self.process is not None:
                self.process.kill()
                self.process.wait()
            while self.mounts():
                subprocess.run(["umount", "-f", "-l", str(self.directory.blocks)], check=True)


def upgrade_request(*, tgtd: bool = False) -> UpgradeRequest:
    """Return a request for the code that runs here, the tests' modules included."""
    request = UpgradeRequest.to_this_code(tgtd=tgtd)
    return replace(request, pythonpath=os.pathsep.join(sys.path))


def initiator(supervised: Supervised) -> Initiator:
    """Return an initiator of the exported disk, once the target that follows tgtd's start is there."""
    target = export(supervised.directory.path)
    found = Initiator(supervised.port, target.iqn, target.chap_username, target.chap_secret)
    deadline = time.monotonic() + START_TIMEOUT_S
    while found.inquiry().returncode != 0:
        assert time.monotonic() < deadline, supervised.tail()
    return found


def _command_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def wait_for_end(pid: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a process that is not ours has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            assert poll.poll(timeout_s * 1000), f"process {pid} lives on"
        finally:
            os.close(descriptor)


class _Answer(socketserver.BaseRequestHandler):
    """Says which process answers."""

    def handle(self) -> None:
        self.request.sendall(f"{os.getpid()}\n".encode())


def _serve_api(listen_fd: int, ready_fd: int) -> None:
    """Be an API: answer on the socket, and have a child process, as gunicorn has."""
    with (
        socketserver.UnixStreamServer("", _Answer, bind_and_activate=False) as server,
        subprocess.Popen(["sleep", "1000"]) as worker,
    ):
        server.socket.close()
        server.socket = socket.socket(fileno=listen_fd)
        signal.signal(signal.SIGTERM, lambda number, frame: worker.kill())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.write(ready_fd, b"R")
        worker.wait()
        server.shutdown()  # who was accepted is answered, as gunicorn does


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the supervisor with the children of tests, or be one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--as-api", "--as-peers", "--as-web", action="store_true")
    parser.add_argument("--listen-fd", type=int)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--no-resend", action="store_true")
    parser.add_argument("--hasty", action="store_true")
    parser.add_argument("--api", choices=("normal", "broken", "missing"), default="normal")
    given = parser.parse_args(arguments)
    if given.as_api:
        _serve_api(given.listen_fd, given.ready_fd)
        return 0
    if given.hasty:  # how often something is tried again matters to a test, not when
        processes.DELAY_MAX_S = portal.PATIENCE_S = _HASTE_S
    configuration = Configuration.model_validate_json(given.config_json.read_bytes())
    apis = {"normal": API_CHILD, "broken": (_PYTHON, "-c", "exit(7)"), "missing": ("/no/program",)}
    supervisor = Supervisor(
        Settings(
            run_dir=configuration.run_dir,
            state_dir=configuration.state_dir,
            config_json=given.config_json,
            port=configuration.iscsi.port,
            peers_address=configuration.peers.listen,
            peers_port=configuration.peers.port,
            web_address=configuration.api.address,
            web_port=configuration.api.port,
        ),
        commands={
            "peers": PEERS_CHILD,
            "web": WEB_CHILD,
            "blockd": [*FUSE_CHILD, *(["--export"] if given.export else [])],
            "api": apis[given.api],
        },
        resend=not given.no_resend,
    )
    return run_reporting(supervisor, "info")


if __name__ == "__main__":
    sys.exit(main())
