"""gunicorn's own messages in our log: it would write them in a form of its own otherwise."""

from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]


class ServerLog(Logger):  # type: ignore[misc]
    """Leaves everything to the root logger; there is no access log beside ours."""

    def setup(self, cfg: Any) -> None:
        """Take the level, and no handler."""
        self.cfg = cfg
        self._access_log_enabled = False
        self.loglevel = self.LOG_LEVELS.get(cfg.loglevel.lower(), self.LOG_LEVELS["info"])
        self.error_log.setLevel(self.loglevel)
        self.error_log.propagate = True
