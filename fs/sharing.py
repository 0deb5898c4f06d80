"""How much of one image other images and snapshots have too: counted from all manifests."""

import os
import threading
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.errors import NotVerified
from stratocache.cache.footprint import footprints

_MANIFEST_BYTES_MAX = 32 * 1024**2
"""Of all manifests together, for images of 400 GiB or so: reading more takes seconds."""
_REMEMBERED_MAX = 1024


class Sharing:
    """Remembers what it counted until any manifest changes; any thread may use it."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._known: dict[str, int | None] = {}
        self._seen: tuple[tuple[str, int, int], ...] = ()

    def shared_bytes(self, name: str) -> int | None:
        """Return the bytes of an image's chunks that another manifest names as well.

        None when there is too much to count, or a manifest cannot be read.
        """
        with self._lock:
            seen = self._look()
            if seen != self._seen or len(self._known) >= _REMEMBERED_MAX:
                self._seen, self._known = seen, {}
            if name not in self._known:
                self._known[name] = self._count(name)
            return self._known[name]

    def _look(self) -> tuple[tuple[str, int, int], ...]:
        """Return every manifest with what changes when it does."""
        found = []
        try:
            with os.scandir(self._state_dir / "manifests") as entries:
                for entry in entries:
                    if entry.name.endswith(seals.SUFFIX) and not entry.name.startswith("."):
                        status = entry.stat(follow_symlinks=False)
                        found.append((entry.name, status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            return ()
        return tuple(sorted(found))

    def _count(self, name: str) -> int | None:
        names = [found.removesuffix(seals.SUFFIX) for found, _, _ in self._seen]
        if name not in names:
            return None
        if sum(size for _, _, size in self._seen) > _MANIFEST_BYTES_MAX:
            return None
        others = [other for other in names if other != name]
        try:
            found = footprints(self._state_dir, others, [name])[name]
        except NotVerified:
            return None
        return found.stored_bytes - found.freeable_bytes
