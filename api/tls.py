"""Server sides of TLS, on which nobody can hold a thread by doing nothing."""

import ssl
from pathlib import Path

from stratocache.api.connection_worker import Patience

_HANDSHAKE_STALL_S = 2
"""Short, as nobody knows yet who it is."""


class ImpatientSocket(Patience, ssl.SSLSocket):
    """A connection on which no call waits for ever, the handshake's least of all."""

    stall_s: float = 10

    def setblocking(self, flag: bool) -> None:
        """Block, but not for longer than `stall_s`."""
        self.settimeout(self.stall_s if flag else 0.0)

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, waiting little, and then for the head of a request."""
        self.settimeout(_HANDSHAKE_STALL_S)
        super().do_handshake(block)
        self.settimeout(self.stall_s)
        self.expect_head()


def server_context(
    certificate_file: Path | str,
    key_file: Path | str,
    minimum: ssl.TLSVersion,
    stall_s: float,
    client_ca_file: Path | None = None,
) -> ssl.SSLContext:
    """Return a context whose sockets give up on who does nothing for `stall_s`.

    With `client_ca_file` clients may show a certificate of those authorities. The files are read now:
    make one for each connection, and renewed ones are used at once. Raises `OSError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum
    context.sslsocket_class = type("_Socket", (ImpatientSocket,), {"stall_s": stall_s})
    context.load_cert_chain(certificate_file, key_file)
    if client_ca_file is not None:
        context.load_verify_locations(cafile=client_ca_file)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context
