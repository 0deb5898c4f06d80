"""QEMU's monitor, by which a test tells a machine what an operator or libvirt would."""

import json
import socket
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120


class MonitorError(Exception):
    """QEMU refused a command."""


class Monitor:
    """QEMU's machine protocol over a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self.events: list[str] = []
        assert "QMP" in json.loads(self._lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return its answer; raises `MonitorError`."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._next()
            if "error" in answer:
                raise MonitorError(answer["error"]["desc"])
            if "event" not in answer:
                return answer["return"]

    def wait_for(self, event: str) -> None:
        """Read until an event of that name has come."""
        while event not in self.events:
            self._next()

    def _next(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._lines.readline())
        if "event" in answer:
            self.events.append(answer["event"])
        return answer

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()
