"""The process that serves peers: gunicorn with threads and TLS on a socket of the supervisor's.

    python -m stratocache.api.peer_server --config-json FILE --listen-fd N --ready-fd M

One worker, so that the limits are those of the host, and less urgent than anything that guests wait
for. Certificate and key are read for each connection: renewed ones are used at once.
"""

import os
import ssl
from typing import Any

from stratocache.api.peer_application import create_peer_app
from stratocache.api.server import Server, serve
from stratocache.api.tls import server_context
from stratocache.cache.configuration import Configuration
from stratocache.fs.state import Database

_STALL_S = 10
"""A client that sends or takes nothing for so long is gone: it holds a thread."""
_KEEP_ALIVE_S = 30
_SPARE_THREADS = 8
"""Beside those that serve: they say at once that this host is busy, and shake hands."""
_CONNECTIONS_MAX = 256
_GRACE_S = 1
"""For requests under way at a stop: a peer that is cut off has others to ask."""
_NICENESS = 10


class PeerServer(Server):
    """gunicorn with TLS."""

    def options(self, configuration: Configuration) -> dict[str, Any]:
        """Return the options that are this server's own."""
        settings = configuration.peers
        return {
            "workers": 1,
            "threads": settings.serve_parallel + _SPARE_THREADS,
            "worker_connections": _CONNECTIONS_MAX,
            "keepalive": _KEEP_ALIVE_S,
            "graceful_timeout": _GRACE_S,
            "proc_name": "stratocache-peers",
            "certfile": str(settings.certificate_file),
            "keyfile": str(settings.key_file),
            "ssl_context": _context,
            "http_protocols": "h1",
        }

    def application(self, configuration: Configuration, db: Database) -> Any:
        """Return what is served."""
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        return create_peer_app(configuration, db)


def _context(settings: Any, _default: object) -> ssl.SSLContext:
    return server_context(settings.certfile, settings.keyfile, ssl.TLSVersion.TLSv1_3, _STALL_S)


def main(arguments: list[str] | None = None) -> None:
    """Serve peers until SIGTERM."""
    serve(PeerServer, "peers", arguments)


if __name__ == "__main__":
    main()
