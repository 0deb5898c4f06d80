"""The API process: gunicorn with threads on `RUN_DIR/api.sock`.

    python -m stratocache.api.server --config-json FILE --listen-fd N --ready-fd M

Stateless: it may be killed and started again at any moment. Whoever starts it holds the listening
socket, so that clients wait meanwhile, and reads `R` from the other end of M when it serves.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]

from stratocache.api.application import create_app
from stratocache.api.connection_worker import ConnectionWorker
from stratocache.api.request_counts import RequestCounts
from stratocache.api.server_log import ServerLog
from stratocache.api.service import threads_of_worker
from stratocache.cache.configuration import Configuration
from stratocache.cache.structured_log import configure_log
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.state import Database

_GRACE_S = 5
_REQUEST_LINE_BYTES_MAX = 4094
_HEADERS_MAX = 64
_HEADER_BYTES_MAX = 8190


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured by us alone: no files, no variables, no command line of its own."""

    def __init__(self, configuration: Configuration, listen_fd: int, ready_fd: int) -> None:
        self._configuration = configuration
        self._listen_fd = listen_fd
        self._ready_fd = ready_fd
        self._requests: RequestCounts | None = None  # of this worker
        self._worker: Any = None
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's options."""
        settings: dict[str, Any] = {
            "bind": f"fd://{self._listen_fd}",
            "worker_class": ConnectionWorker,
            "limit_request_line": _REQUEST_LINE_BYTES_MAX,
            "limit_request_fields": _HEADERS_MAX,
            "limit_request_field_size": _HEADER_BYTES_MAX,
            "graceful_timeout": _GRACE_S,
            "logger_class": ServerLog,
            "loglevel": self._configuration.log_level,
            "worker_tmp_dir": str(self._configuration.run_dir),
            "control_socket_disable": True,
            "post_worker_init": self._report,
            "worker_exit": self._end,
        }
        for name, value in {**settings, **self.options(self._configuration)}.items():
            self.cfg.set(name, value)

    def options(self, configuration: Configuration) -> dict[str, Any]:
        """Return the options that are this server's own."""
        return {
            "workers": configuration.api.workers,
            "threads": threads_of_worker(configuration.api),
            "proc_name": "stratocache-api",
        }

    def is_ending(self) -> bool:
        """Tell whether this worker has been told to stop."""
        return self._worker is not None and not self._worker.alive

    def _report(self, worker: object) -> None:
        self._worker = worker
        with suppress(BrokenPipeError):  # a later worker; nobody asks any more
            os.write(self._ready_fd, b"R")

    def _end(self, arbiter: object, worker: object) -> None:
        if self._requests is not None:
            self._requests.end()

    def run(self) -> None:
        """Serve until told to stop, and leave the socket's name alone: the socket is not ours."""
        arbiter = Arbiter(self)
        arbiter.systemd = True
        arbiter.run()

    def load(self) -> Any:
        """Make the application, once in each worker, after the fork."""
        return self.application(self._configuration, Database(self._configuration.database))

    def application(self, configuration: Configuration, db: Database) -> Any:
        """Return what is served."""
        self._requests = RequestCounts(RunDirectory(configuration.run_dir).counts)
        self._requests.write_on()
        return create_app(configuration, db, self._requests, is_ending=self.is_ending)


def serve(server: type[Server], name: str, arguments: list[str] | None) -> None:
    """Run a kind of server until SIGTERM; `name` is what its log calls it."""
    parser = argparse.ArgumentParser(prog=server.__module__)
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parsed = parser.parse_args(arguments)
    configuration = Configuration.model_validate_json(parsed.config_json.read_bytes())
    configure_log(name, configuration.log_level, configuration.log.format)
    db = Database(configuration.database)
    db.migrate()
    db.close()
    os.umask(0o077)
    server(configuration, parsed.listen_fd, parsed.ready_fd).run()


def main(arguments: list[str] | None = None) -> None:
    """Serve the API until SIGTERM."""
    serve(Server, "api", arguments)


if __name__ == "__main__":
    main()
