"""The address that initiators connect to, as the supervisor and `tgt.py` see it.

Standard library only.
"""

import errno
import socket
import time
from dataclasses import dataclass

from stratocache.cache.errors import Conflict, InvalidInput

PATIENCE_S = 10.0
"""How long a predecessor's tgtd may take to let go of the portal."""
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Portal:
    """One TCP address; as text, as tgtd wants it."""

    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    def addresses(self) -> set[str]:
        """Return the numeric addresses that it stands for.

        Raises `InvalidInput` (`portal-invalid`) when its name is not known.
        """
        try:
            found = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise self._invalid(error) from error
        return {str(where[0]).partition("%")[0] for *_, where in found}

    def _invalid(self, error: OSError) -> InvalidInput:
        return InvalidInput(
            "portal-invalid",
            f"Nobody can listen on {self} ({error.strerror}); set iscsi.address and iscsi.port.",
            field="iscsi.address",
        )

    def is_free(self) -> bool:
        """Whether tgtd could listen. Nobody who connects meanwhile is answered.

        Raises `InvalidInput` (`portal-invalid`) when nobody ever could.
        """
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.address, self.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise self._invalid(error) from error
                return False
        return True

    def wait_until_free(self) -> None:
        """Wait for a predecessor's tgtd, which dies with its supervisor, but not at once.

        Raises `Conflict` (`portal-in-use`).
        """
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_free():
            if time.monotonic() > deadline:
                raise Conflict(
                    "portal-in-use",
                    f"{self} is used by another program; stop it or set another iscsi.port.",
                )
            time.sleep(_POLL_INTERVAL_S)
