"""systemd's protocol, played with real sockets: told of states, keeps descriptors, gives them back.

As systemd does, it forgets a stored descriptor that reports an error (an aborted connection).
Sources: sd_notify(3), sd_listen_fds(3).
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

_TIMEOUT_S = 20
_DESCRIPTORS_MAX = 4

# argv: the stored descriptors, separated by commas, their names, the command
_LAUNCHER = """
import os, sys
descriptors = [int(number) for number in sys.argv[1].split(",") if number]
copies = [os.dup2(os.dup(number), 100 + place) for place, number in enumerate(descriptors)]
for place, copy in enumerate(copies):
    os.dup2(copy, 3 + place)
os.closerange(3 + len(copies), 1000)
if copies:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(copies)),
                   "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


class ServiceManager:
    """A context manager that listens on `path` and starts services."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        """The messages without those about descriptors."""
        self.stored: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, _DESCRIPTORS_MAX)
            lines = message.decode().splitlines()
            fields = dict(line.partition("=")[::2] for line in lines)
            if "END" in fields:
                return
            if "FDSTORE" in fields:
                (self.stored[fields["FDNAME"]],) = descriptors
            elif "FDSTOREREMOVE" in fields:
                self._forget(fields["FDNAME"])
            else:
                self.said.append(message.decode())

    def _forget(self, name: str) -> None:
        if name in self.stored:
            os.close(self.stored.pop(name))

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a service with what is stored."""
        poll = select.poll()
        for descriptor in self.stored.values():
            poll.register(descriptor, 0)
        broken = {descriptor for descriptor, _ in poll.poll(0)}
        for name in [name for name, number in self.stored.items() if number in broken]:
            self._forget(name)
        numbers = ",".join(map(str, self.stored.values()))
        return subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, numbers, ":".join(self.stored), *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=tuple(self.stored.values()),
            env={**environment, "NOTIFY_SOCKET": str(self.path)},
        )  # fmt: skip

    def wait_for(self, message: str) -> None:
        """Return when a message has come."""
        deadline = time.monotonic() + _TIMEOUT_S
        while message not in self.said:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.closing(self._socket), socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM
        ) as ender:  # fmt: skip
            ender.sendto(b"END=1", str(self.path))
            self._thread.join()
        for name in list(self.stored):
            self._forget(name)
