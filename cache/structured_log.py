"""What our processes write to their log, and on whose behalf: text for people, or JSON by the line.

A request has an id, an operation has one and remembers that of its request; whatever is logged while
they are worked on, down to the download, carries both (`ON_BEHALF`). Standard library only.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s {process} %(levelname)s %(name)s: %(message)s%(on_behalf)s"
# so that no name or address that somebody chose looks like a line of its own
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}
_CONTROL[ord("\n")] = "\\n"


@dataclass(frozen=True)
class OnBehalf:
    """For what something is done; empty = unknown."""

    request_id: str = ""
    operation_id: str = ""


_NOBODY = OnBehalf()
ON_BEHALF: ContextVar[OnBehalf] = ContextVar("on_behalf", default=_NOBODY)
"""Of the running task or thread; what they start inherits it."""


@contextmanager
def on_behalf_of(**ids: str) -> Iterator[None]:
    """Set ids for the time of a block."""
    token = ON_BEHALF.set(replace(ON_BEHALF.get(), **ids))
    try:
        yield
    finally:
        ON_BEHALF.reset(token)


def configure_log(process: str, level: str, form: LogFormat) -> None:
    """Log to stderr from now on; `process` is what lines are attributed to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(process) if form == "json" else _Text(process))
    root = logging.getLogger()
    for present in list(root.handlers):
        root.removeHandler(present)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for talkative in ("httpx", "httpcore"):  # what they say names every address
        logging.getLogger(talkative).setLevel(logging.WARNING)


def _ids() -> dict[str, str]:
    return {name: value for name, value in asdict(ON_BEHALF.get()).items() if value}


class _Text(logging.Formatter):
    """One line per record; a traceback follows on lines of its own."""

    def __init__(self, process: str) -> None:
        super().__init__(_TEXT.format(process=process))

    def formatMessage(self, record: logging.LogRecord) -> str:
        ids = " ".join(f"{name}={value}" for name, value in _ids().items())
        record.on_behalf = f" [{ids}]" if ids else ""
        record.message = record.message.translate(_CONTROL)
        return super().formatMessage(record)


class _JsonLines(logging.Formatter):
    """One JSON object per record, on one line; what `extra` has in `facts` is part of it."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        document: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)  # ASCII: some take U+2028 for the end of a line
