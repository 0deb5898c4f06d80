"""A whole appliance for tests: real supervisor, blockd, tgtd and API in directories of its own."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from support.service_manager import ServiceManager

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("api", timeout=120)
        self._path = path

    def connect(self) -> None:
        """Connect, leaving no socket open when nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Appliance:
    """`stratocache serve` on directories below `root`; start and stop it as often as you like."""

    def __init__(
        self,
        root: Path,
        *,
        endpoint: str,
        fingerprint: str = "",
        extra: str = "",
        state_dir: Path | None = None,
    ) -> None:
        self.root = root
        self.state_dir = state_dir or root / "state"
        self.run_dir = root / "run"
        self.port = free_port()
        self.configuration = root / "stratocache.toml"
        self.log = root / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.manager: ServiceManager | None = None
        """Who keeps descriptors for it, as systemd does."""
        root.mkdir(parents=True, exist_ok=True)
        self.configuration.write_text(
            f'state_dir = "{self.state_dir}"\n'
            f'run_dir = "{self.run_dir}"\n'
            f"{extra}\n"
            f"[iscsi]\nport = {self.port}\n"
            f"[space]\nreserve_bytes = 16777216\n"
            f'[catalogues.stratuslab]\nendpoint = "{endpoint}"\n'
            f'trusted_fingerprints = ["{fingerprint}"]\n'
        )

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of a `stratocache` command on this appliance."""
        return [
            sys.executable, "-m", "stratocache", "--config", str(self.configuration), *arguments
        ]  # fmt: skip

    def start(self) -> None:
        """Start the appliance and return when it says that it is ready."""
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as log:
            if self.manager is not None:
                self.process = self.manager.start(self.command("serve"), environment, log)
            else:
                self.process = subprocess.Popen(
                    self.command("serve"), stdout=log, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True, env=environment,
                )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def ready(self) -> bool:
        """Whether `/readyz` says so."""
        with contextlib.suppress(OSError, ValueError):
            return self.request("GET", "/readyz")[0] == 200
        return False

    def request(
        self, method: str, path: str, body: Any = None, *, token: str = ""
    ) -> tuple[int, Any]:
        """Ask the API, with a token if one is given; return the status and the decoded body."""
        status, content = self.exchange(method, path, body, token=token)
        return status, json.loads(content) if content else None

    def exchange(
        self, method: str, path: str, body: Any = None, *, token: str = ""
    ) -> tuple[int, bytes]:
        """Ask the API; return the status and the body as it came."""
        connection = UnixConnection(self.run_dir / "api.sock")
        with contextlib.closing(connection):
            try:
                headers = {"Content-Type": "application/json"} if body is not None else {}
                if token:
                    headers["Authorization"] = f"Bearer {token}"
                connection.request(
                    method, path, None if body is None else json.dumps(body), headers
                )
                answer = connection.getresponse()
                content = answer.read()
            except http.client.HTTPException as error:
                raise OSError(str(error)) from error
        return answer.status, content

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a `stratocache` command."""
        return subprocess.run(
            self.command(*arguments), check=False, capture_output=True, text=True,
            timeout=timeout_s, env={**os.environ, **self.environment},
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        """Run a command with `--json`; it must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def stop(self) -> None:
        """Stop the appliance in order; it must leave no mount behind."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        finally:
            if self.process.poll() is None:
                self.kill()
            self.process = None

    def kill(self) -> None:
        """Kill every process of the appliance at once, as a lost host would."""
        if self.process is None:
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        self.process = None

    def pids(self, *wanted: str) -> list[int]:
        """Return the supervisor's and its descendants' process ids, or those whose command line
        has one of the wanted texts."""
        assert self.process is not None
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += [int(child) for child in (task / "children").read_text().split()]
        if not wanted:
            return found
        return [pid for pid in found if any(text in _command_line(pid) for text in wanted)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        with contextlib.suppress(OSError):
            subprocess.run(["umount", "-l", str(self.run_dir / "blocks")], check=False,
                           capture_output=True)  # fmt: skip


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@contextlib.contextmanager
def small_filesystem(mount_point: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of a size, for what happens when a disk is full."""
    mount_point.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(mount_point)], check=True
    )
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "-l", str(mount_point)], check=True)
        shutil.rmtree(mount_point, ignore_errors=True)
