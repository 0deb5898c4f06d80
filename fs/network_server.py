"""A child that serves a TCP socket of the supervisor's: what serves peers, and what serves the web.

Standard library only. The socket is made when it can be, unless a predecessor left one; nothing else
waits for it.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from stratocache.fs import handover
from stratocache.fs.listener import listen_tcp, listens_on
from stratocache.fs.processes import Child
from stratocache.fs.service_manager import ServiceManager


class NetworkServer:
    """One such child, with its command, address and socket; an empty address = not served."""

    def __init__(self, child: Child, command: Sequence[str], address: str, port: int) -> None:
        self.child = child
        self.command = command
        self.listener: socket.socket | None = None
        self._address = address
        self._port = port

    @property
    def name(self) -> str:
        """Of the child, and of the socket in the service manager's store."""
        return self.child.name

    @property
    def wanted(self) -> bool:
        """Whether it is to be served."""
        return self._address != ""

    def listen(self) -> socket.socket:
        """Return the socket that clients connect to; raises `OSError`."""
        if self.listener is None:
            self.listener = listen_tcp(self._address, self._port)
        return self.listener

    def take(self, stored: Mapping[str, int]) -> None:
        """Go on with the socket that the service manager kept, if it is the one that is wanted."""
        descriptor = stored.get(self.name)
        if descriptor is None:
            return
        if self.wanted and listens_on(descriptor, self._address, self._port):
            self.listener = socket.socket(fileno=descriptor)
        else:
            os.close(descriptor)

    def store(self, manager: ServiceManager) -> None:
        """Let the service manager keep the socket, if there is one."""
        if self.listener is not None:
            manager.store(self.name, self.listener.fileno())

    def close(self) -> None:
        """Listen no more."""
        if self.listener is not None:
            self.listener.close()

    # -- across a re-execution

    @property
    def _handed_as(self) -> str:
        return f"{self.name.removesuffix('s')}_listener"

    def handed_over(self) -> dict[str, int]:
        """Return what `resume` needs, as JSON; the descriptor must stay open."""
        return {} if self.listener is None else {self._handed_as: self.listener.fileno()}

    def resume(self, handed: Mapping[str, Any]) -> None:
        """Go on with the socket of our predecessor, which may know nothing of it."""
        if handed.get(self._handed_as) is not None:
            self.listener = socket.socket(fileno=handover.own(handed[self._handed_as]))
