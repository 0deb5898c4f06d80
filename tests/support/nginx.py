"""A real nginx that serves a folder on loopback, and what its access log says it was asked."""

import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_START_TIMEOUT_S = 20
_LINE = re.compile(r'(\d+) (\S+) "(?:bytes=(\d+)-(\d+)|-|[^"]*)" (\d+)')
_CHUNK = re.compile(r".*/([0-9a-f]{64})\.cacnk")


@dataclass(frozen=True)
class Asked:
    """One line of the access log."""

    status: int
    path: str
    start: int
    end: int
    """Behind the last byte of the range; 0 when none was asked for."""
    sent_bytes: int


class Nginx:
    """A context manager; `limit_rate` is nginx's, for each connection."""

    def __init__(
        self, root: Path, folder: Path, *, limit_rate: str = "0", ranges: bool = True
    ) -> None:
        self._root = root
        self._log = root / "access.log"
        root.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._configuration = root / "nginx.conf"
        self._configuration.write_text(
            f"daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/error.log;\n"
            "worker_processes 1; events { worker_connections 512; }\n"
            "http {\n"
            "  log_format asked '$status $uri \"$http_range\" $body_bytes_sent';\n"
            f"  access_log {self._log} asked;\n"
            + "".join(
                f"  {name}_temp_path {root}/{name};\n"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + f"  server {{ listen 127.0.0.1:{self.port}; root {folder}; limit_rate {limit_rate};\n"
            + ("" if ranges else "    max_ranges 0;\n")
            + "  }\n}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
        assert nginx is not None, "nginx is missing: see packaging/apt-packages-test.txt"
        self._process = subprocess.Popen(
            [nginx, "-c", str(self._configuration), "-p", str(self._root), "-g", "user root;"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._root / "error.log"
                    raise AssertionError(log.read_text() if log.exists() else "") from None
            time.sleep(0.02)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Accept connections and say nothing during the block, or until `speak`."""
        self._running.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.speak()

    def speak(self) -> None:
        """Go on after `silent`."""
        self._running.send_signal(signal.SIGCONT)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def requests(self) -> list[Asked]:
        """Return what was asked so far, in the order of the answers' ends."""
        found = []
        for line in self._log.read_text().splitlines():
            match = _LINE.fullmatch(line)
            if match is not None:
                start, end = (int(match[3]), int(match[4]) + 1) if match[3] else (0, 0)
                found.append(Asked(int(match[1]), match[2], start, end, int(match[5])))
        return found

    def chunk_requests(self) -> Counter[str]:
        """Return how often each chunk of a chunk store was served."""
        matches = [_CHUNK.fullmatch(asked.path) for asked in self.requests() if asked.status == 200]
        return Counter(match[1] for match in matches if match is not None)

    def sent_bytes(self) -> int:
        """Return the bytes of all bodies."""
        return sum(asked.sent_bytes for asked in self.requests())
