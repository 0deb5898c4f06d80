"""An upgrade in place as data: what is asked of the supervisor, and what became of it.

`stratocache upgrade` writes RUN_DIR/upgrade.json and sends SIGHUP; the supervisor's answer is the
`upgrade` of RUN_DIR/supervisor.json. Standard library only. `SUPERVISOR.md`, "Upgrade".
"""

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from stratocache.cache.errors import ErrorRecord, InvalidInput
from stratocache.fs import handover

_BYTES_MAX = 16 * 1024


@dataclass(frozen=True)
class UpgradeRequest:
    """Which code is to run from now on: an interpreter and where it looks for modules."""

    id: str
    python: str
    pythonpath: str
    """PYTHONPATH; empty for none."""
    tgtd: bool
    """Whether tgtd is started again too, which makes initiators log in again."""

    @classmethod
    def to_this_code(cls, *, tgtd: bool = False) -> Self:
        """Return a request for the code that runs here."""
        parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join(os.path.abspath(part) for part in parts if part)
        return cls(uuid.uuid4().hex, sys.executable, path, tgtd)

    def write(self, path: Path) -> None:
        """Replace the file, mode 0600; raises `OSError`."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        fresh.rename(path)

    @classmethod
    def take(cls, path: Path) -> Self:
        """Read a request and remove it; without one, ask for the code that runs here.

        Raises `InvalidInput` (`upgrade-request-invalid`), also when another user wrote it.
        """
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                content = file.read(_BYTES_MAX)
            path.unlink()
        except FileNotFoundError:
            return cls.to_this_code()
        try:
            request = cls(**json.loads(content))
            valid = os.path.isabs(request.python) and isinstance(request.id, str)
        except (ValueError, TypeError):
            valid = False
        if not valid or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise InvalidInput(
                "upgrade-request-invalid",
                f"{path} was not written by `stratocache upgrade` of this user; use that.",
            )
        return request

    @property
    def environment(self) -> dict[str, str]:
        """Our variables, with those of the new code."""
        return {**os.environ, "PYTHONPATH": self.pythonpath}

    def check_command(self, config_json: Path, report_fd: int) -> list[str]:
        """Return how the new code is asked whether it can take over (`upgrade_check`)."""
        return [
            self.python, "-m", "stratocache.fs.upgrade_check", "--config-json", str(config_json),
            "--handover-format", str(handover.FORMAT), "--report-fd", str(report_fd),
        ]  # fmt: skip


class Progress(StrEnum):
    """How far an upgrade is."""

    CHECKING = "checking"
    ROLLING = "rolling"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class RolledStep:
    """A process that runs the new code now."""

    name: str
    pause_s: float
    """From the end of the old one until the new one was ready."""


@dataclass
class UpgradeRecord:
    """What became of a request."""

    id: str
    from_version: str
    to_version: str = ""
    progress: Progress = Progress.CHECKING
    steps: list[RolledStep] = field(default_factory=list)
    error: ErrorRecord | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.progress in (Progress.DONE, Progress.FAILED)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made; raises `KeyError`, `TypeError`, `ValueError`."""
        return cls(
            id=fields["id"],
            from_version=fields["from_version"],
            to_version=fields["to_version"],
            progress=Progress(fields["progress"]),
            steps=[RolledStep(step["name"], step["pause_s"]) for step in fields["steps"]],
            error=fields["error"],
        )
