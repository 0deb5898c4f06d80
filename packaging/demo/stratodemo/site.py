"""The site of the demonstration: a Marketplace and the appliance, both on loopback.

Stratocache is driven as its users drive it: through its command line. Everything lives in a fresh
folder, its sockets and mounts in one below /run, and everything started is stopped with the site.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stratodemo.narration import StepFailed, require

_COMMAND = Path(sys.executable).with_name("stratocache")
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 180.0
_LOG_TAIL_LINES = 40
_PREFIX = "stratocache-demo-"


class CommandFailed(StepFailed):
    """A `stratocache` command ended with another status than 0."""

    def __init__(self, line: str, status: int, words: str) -> None:
        super().__init__(f"{line}: exit {status}: {words}")
        self.status = status
        self.words = words


class Site:
    """Fresh folders with state, logs and servers; a context manager that takes it all down."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.logs = self.folder / "logs"
        self.published = self.folder / "published"
        self.entries = self.folder / "entries"
        self.state = self.folder / "state"
        for folder in (self.logs, self.published, self.entries, self.state):
            folder.mkdir()
        # not below $TMPDIR: the path of a socket has 108 bytes at most, see unix(7)
        self.run = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/run"))
        self.marketplace_port, self.iscsi_port = _free_ports(2)
        self.configuration = self.folder / "stratocache.toml"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_all()
        if error is None:
            shutil.rmtree(self.folder)
            shutil.rmtree(self.run)
        else:
            self._sweep()
            if self.leftovers() == []:
                self._keep_only_logs()

    @property
    def api_socket(self) -> Path:
        """The appliance's Unix socket."""
        return self.run / "api.sock"

    @property
    def marketplace_url(self) -> str:
        """The Marketplace of the demonstration."""
        return f"http://127.0.0.1:{self.marketplace_port}"

    def configure(self, fingerprint: str) -> None:
        """Write the appliance's configuration: trust the endorser with this certificate."""
        self.configuration.write_text(
            f'state_dir = "{self.state}"\n'
            f'run_dir = "{self.run}"\n'
            "[iscsi]\n"
            f"port = {self.iscsi_port}\n"
            "[catalogues.stratuslab]\n"
            f'endpoint = "{self.marketplace_url}"\n'
            f'trusted_fingerprints = ["{fingerprint}"]\n'
        )

    def start_marketplace(self) -> None:
        """Serve the folder with the signed entries, and the image files beside it."""
        command = [
            str(_COMMAND), "marketplace", "serve", str(self.entries), "--images", str(self.published),
            "--address", "127.0.0.1", "--port", str(self.marketplace_port),
        ]  # fmt: skip
        self._start("marketplace", command)
        self._wait_for_port("marketplace", self.marketplace_port)

    def start_appliance(self) -> None:
        """Run `stratocache serve` and wait until its API says that it is ready."""
        self._start("appliance", [str(_COMMAND), "serve"])
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._ready():
            self._require_running("appliance")
            require(time.monotonic() < deadline, f"not ready within {_START_TIMEOUT_S:g} s")
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        """End a server politely, then by force; it may have ended before."""
        process = self._processes.pop(name)
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """End every server, the last started first."""
        for name in reversed(list(self._processes)):
            self.stop(name)

    def command(self, *arguments: str | Path) -> str:
        """Run `stratocache ARGUMENTS` and return what it printed. Raises `CommandFailed`."""
        line = " ".join(["stratocache", *map(str, arguments)])
        try:
            result = subprocess.run(
                [_COMMAND, *arguments],
                check=False, capture_output=True, text=True,
                env=self._environment, timeout=_COMMAND_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{line}: no end after {_COMMAND_TIMEOUT_S:g} s") from None
        with (self.logs / "commands.log").open("a") as log:
            log.write(f"$ {line}\n{result.stdout}{result.stderr}-> {result.returncode}\n")
        if result.returncode != 0:
            words = (result.stderr.strip() or result.stdout.strip())[-600:]
            raise CommandFailed(line, result.returncode, words)
        return result.stdout

    def query(self, *arguments: str | Path) -> Any:
        """Run a command with `--json` and return what it answered."""
        printed = self.command(*arguments, "--json")
        try:
            return json.loads(printed)
        except ValueError:
            raise StepFailed(f"stratocache {arguments[0]}: no JSON: {printed[:200]!r}") from None

    def log_tails(self) -> str:
        """Return the last lines of every log."""
        parts = []
        for log in sorted(self.logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            parts.append(f"--- {log}\n" + "\n".join(lines))
        return "\n".join(parts)

    def leftovers(self) -> list[str]:
        """Return mounts, loop devices and processes that still belong to the site."""
        return [
            *(f"mount {mount}" for mount in self._mounts()),
            *(f"loop device {device}" for device in self._loop_devices()),
            *(f"process {process}" for process in self._processes_here()),
        ]

    def _sweep(self) -> None:
        """Take down what a failed demonstration left, whoever should have done so."""
        for process in self._processes_here():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        for device in self._loop_devices():
            subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)

    def _keep_only_logs(self) -> None:
        shutil.rmtree(self.run)
        for path in self.folder.iterdir():
            if path.is_dir() and path != self.logs:
                shutil.rmtree(path)
            elif path != self.logs:
                path.unlink()

    def _mounts(self) -> list[str]:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        ours = (f"{self.folder}/", f"{self.run}/")
        return [mount for mount in mounts if mount.startswith(ours)]

    def _loop_devices(self) -> list[str]:
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):  # detached between the listing and the reading
                if str(self.folder) in backing.read_text():
                    found.append(f"/dev/{backing.parts[3]}")
        return found

    def _processes_here(self) -> list[int]:
        """Find processes by the folders' names in their command line or environment."""
        folders = [str(folder).encode() for folder in (self.folder, self.run)]
        servers = {server.pid for server in self._processes.values()}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile
                words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                ours = any(folder in words for folder in folders)
                if ours and int(process.name) not in servers:
                    found.append(int(process.name))
        return found

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "STRATOCACHE_CONFIG": str(self.configuration)}

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches the demonstration, which then stops everything.
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment, start_new_session=True,
            )  # fmt: skip

    def _require_running(self, name: str) -> None:
        status = self._processes[name].poll()
        require(status is None, f"the {name} server ended at once with status {status}")

    def _wait_for_port(self, name: str, port: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            self._require_running(name)
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                require(time.monotonic() < deadline, f"the {name} server does not listen")
                time.sleep(0.05)

    def _ready(self) -> bool:
        """Ask `GET /readyz` over the Unix socket."""
        request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            try:
                connection.connect(str(self.api_socket))
                connection.sendall(request)
                return b" 200 " in connection.recv(64)
            except OSError:
                return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
