"""Whether the FUSE mount is still where targets look for it.

Somebody who unmounts it lazily takes nothing from what is open: guests go on. But no overlay and no
image can be attached any more, which only a restart of the appliance mends, as the kernel mounts a
connection once. So it is reported, when it goes and when it comes back.
"""

import logging
import time
from pathlib import Path

from stratocache.fs.fuse_mount import mounted_at
from stratocache.fs.state import Database, record_event

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class MountWatch:
    """Watches one mount point."""

    def __init__(self, db: Database, mount_point: Path) -> None:
        self._db = db
        self._mount_point = mount_point
        self._mounted = True
        self._looked_at = -_INTERVAL_S

    def is_due(self) -> bool:
        """Tell whether it is time to look again."""
        return time.monotonic() >= self._looked_at + _INTERVAL_S

    def look(self) -> None:
        """Record when it has gone or come since the last look. Blocks."""
        self._looked_at = time.monotonic()
        mounted = bool(mounted_at(self._mount_point))
        if mounted == self._mounted:
            return
        self._mounted = mounted
        kind, message = "mount.found", f"{self._mount_point} is mounted again."
        if not mounted:
            kind = "mount.missing"
            message = (
                f"Somebody unmounted {self._mount_point}: guests go on, but overlays and images "
                "cannot be attached; restart stratocache when the guests are halted."
            )
        log.error("%s", message)
        with self._db.transaction() as connection:
            record_event(connection, kind, str(self._mount_point), message)
