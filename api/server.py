"""The API process: gunicorn with threads on `RUN_DIR/api.sock`.

    python -m stratocache.api.server --config-json FILE

Stateless: it may be killed and started again at any moment.
"""

import argparse
import logging
import os
import socket
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

from stratocache.api.application import create_app
from stratocache.api.identity import group_id
from stratocache.cache.configuration import Configuration
from stratocache.fs.state import Database

_SOCKET_MODE = 0o660
_BACKLOG = 512
_GRACE_S = 5


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured by us alone: no files, no variables, no command line of its own."""

    def __init__(self, configuration: Configuration, listener: socket.socket) -> None:
        self._configuration = configuration
        self._listener = listener
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's options."""
        settings: dict[str, Any] = {
            "bind": f"fd://{self._listener.detach()}",
            "worker_class": "gthread",
            "workers": self._configuration.api.workers,
            "threads": self._configuration.api.threads,
            "graceful_timeout": _GRACE_S,
            "loglevel": self._configuration.log_level,
            "proc_name": "stratocache-api",
            "worker_tmp_dir": str(self._configuration.run_dir),
            "control_socket_disable": True,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Make the application, once in each worker, after the fork."""
        return create_app(self._configuration, Database(self._configuration.database))


def listen(path: Path, group: str) -> socket.socket:
    """Return a listening Unix socket at `path`, mode 0660, of `group` when there is one.

    What a dead server left there is replaced. Raises `OSError`.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o777 & ~_SOCKET_MODE)  # no moment at which others may connect
    try:
        listener.bind(str(path))
        members = group_id(group)
        if members is not None:
            os.chown(path, -1, members)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="stratocache.api.server", description=__doc__)
    parser.add_argument("--config-json", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    configuration = Configuration.model_validate_json(parsed.config_json.read_bytes())
    logging.basicConfig(
        level=configuration.log_level.upper(),
        format="%(asctime)s api %(levelname)s %(name)s: %(message)s",
    )
    db = Database(configuration.database)
    db.migrate()
    db.close()
    os.umask(0o077)
    Server(configuration, listen(configuration.api_socket, configuration.api.group)).run()


if __name__ == "__main__":
    main()
