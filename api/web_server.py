"""The process that serves people and programs of the network: the API and the pages, over TLS.

    python -m stratocache.api.web_server --config-json FILE --listen-fd N --ready-fd M

The same application as on the Unix socket. Certificate and key are read for each connection: renewed
ones are used at once.
"""

import logging
import ssl
from typing import Any

from stratocache.api.server import Server, serve
from stratocache.api.tls import server_context
from stratocache.api.web_certificate import ensure_certificate, fingerprint
from stratocache.cache.configuration import Configuration
from stratocache.fs.state import Database
from stratocache.fs.tokens import offer_first_token

log = logging.getLogger(__name__)

_STALL_S = 60
"""A client that sends or takes nothing for so long is gone: it holds a thread."""
_KEEP_ALIVE_S = 30


class WebServer(Server):
    """gunicorn, with TLS unless a proxy on this machine has it."""

    def options(self, configuration: Configuration) -> dict[str, Any]:
        """Return the options that are this server's own."""
        options = {
            **super().options(configuration),
            "keepalive": _KEEP_ALIVE_S,
            "proc_name": "stratocache-web",
        }
        if not configuration.api.tls:
            return options
        files = ensure_certificate(configuration)
        client_ca_file = configuration.api.client_ca_file

        def context(_settings: Any, _default: object) -> ssl.SSLContext:
            return server_context(
                files.certificate, files.key, ssl.TLSVersion.TLSv1_2, _STALL_S, client_ca_file
            )

        return {
            **options,
            "certfile": str(files.certificate),
            "keyfile": str(files.key),
            "ssl_context": context,
            "http_protocols": "h1",
        }

    def run(self) -> None:
        """Serve until told to stop, once it was said how to begin."""
        self._introduce()
        super().run()

    def _introduce(self) -> None:
        """Say which certificate browsers will show, and how to make the first account."""
        configuration = self._configuration
        found = fingerprint(configuration)
        if found is not None:
            log.warning("the certificate's fingerprint is sha256:%s", found)
        db = Database(configuration.database)
        path = configuration.first_token_file
        try:
            token = offer_first_token(db, path)
        finally:
            db.close()
        if token is not None:
            log.warning(
                "there is no account yet; make an administrator's with this token, which is also in "
                "%s and good for that only: %s", path, token,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Serve the network until SIGTERM."""
    serve(WebServer, "web", arguments)


if __name__ == "__main__":
    main()
