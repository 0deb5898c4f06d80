"""RUN_DIR/supervisor.json: what the supervisor says about itself to the API, `doctor`, `upgrade`.

Replaced in one step whenever something changes; removed at a stop. Standard library only.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from stratocache.fs.upgrade import UpgradeRecord

_BYTES_MAX = 64 * 1024


class State(StrEnum):
    """How the appliance is."""

    STARTING = "starting"
    """A child is being started, for the first time or again."""
    READY = "ready"
    FROZEN = "frozen"
    """`blockd` has crashed too often and is not started any more: guests wait."""
    UPGRADING = "upgrading"


@dataclass(frozen=True)
class ChildStatus:
    """One child."""

    pid: int
    """0 without a process."""
    started_at: float
    """Seconds since the epoch; 0 when it was never started."""
    restarts: int
    ready: bool
    pause_s: float = 0.0
    """From the end of the process before until this one was ready; 0 of the first."""
    paused_s: float = 0.0
    """All such pauses together."""


@dataclass(frozen=True)
class SupervisorStatus:
    """The content of the file."""

    version: str
    pid: int
    state: State
    fault: str
    """Why it is frozen and what to do, else empty."""
    children: dict[str, ChildStatus]
    upgrade: UpgradeRecord | None
    """The last upgrade that was asked for, or None."""

    def to_json(self) -> str:
        """Return what the file holds."""
        return json.dumps(asdict(self), indent=1)


def write_status(path: Path, content: str) -> None:
    """Replace the file; raises `OSError`. Not synced: it is worth nothing after a reboot."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    fresh.rename(path)


def read_status(path: Path) -> SupervisorStatus | None:
    """Return what the living supervisor said last; None when there is none, or nothing readable."""
    try:
        with path.open("rb") as file:
            status = _from_json(json.loads(file.read(_BYTES_MAX)))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return status if Path(f"/proc/{status.pid}").exists() else None


def _from_json(fields: Any) -> SupervisorStatus:
    """Read what any version wrote: fields that this one does not know are left out."""
    children = {
        name: ChildStatus(**_known(child, tuple(ChildStatus.__dataclass_fields__)))
        for name, child in fields["children"].items()
    }
    upgrade = fields["upgrade"]
    return SupervisorStatus(
        version=str(fields["version"]),
        pid=int(fields["pid"]),
        state=State(fields["state"]),
        fault=str(fields["fault"]),
        children=children,
        upgrade=None if upgrade is None else UpgradeRecord.from_json(upgrade),
    )


def _known(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in names}
