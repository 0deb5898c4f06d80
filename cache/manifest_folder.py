"""The manifests of a state directory, which say what images there are."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.errors import InvalidInput, NotFound, NotVerified
from stratocache.cache.manifest import Manifest

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ManifestFolder:
    """The manifests of published images, with their seals. Methods block; any thread may call them."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._directory = state_dir / "manifests"
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._quarantine = state_dir / "quarantine"

    def manifest_path(self, identifier: str) -> Path:
        """Return where an image's manifest is, or would be.

        Raises `InvalidInput` (`identifier-invalid`) for what cannot be an identifier.
        """
        if not _IDENTIFIER.fullmatch(identifier):
            raise InvalidInput(
                "identifier-invalid",
                f"{identifier[:80]!r} is not an image identifier: letters, digits, - and _ only.",
                field="identifier",
            )
        return seals.manifest_path(self._state_dir, identifier)

    def identifiers(self) -> list[str]:
        """Return the identifiers of all published images, sorted."""
        return sorted(
            path.name.removesuffix(seals.SUFFIX)
            for path in self._directory.iterdir()
            if path.name.endswith(seals.SUFFIX) and not path.name.startswith(".")
        )

    def manifest(self, identifier: str) -> Manifest:
        """Read an image's manifest. Raises `NotFound` (`image-not-found`), `NotVerified`."""
        try:
            self.manifest_path(identifier)
            return seals.read_manifest(self._state_dir, identifier)
        except FileNotFoundError:
            raise NotFound(
                "image-not-found", f"No image {identifier} is in the cache; fetch it first."
            ) from None

    def seal(self, identifier: str) -> None:
        """Put back the seal of a manifest that is whole; one that went needs none.

        Raises `NotVerified` (`manifest-invalid`).
        """
        with suppress(FileNotFoundError):
            seals.adopt(self._state_dir, identifier)

    def copy_to_quarantine(self, identifier: str) -> None:
        """Keep a damaged manifest for whoever looks into it; absent is fine.

        It stays where it is: while a manifest cannot be read no chunk is removed.
        """
        self._quarantine.mkdir(mode=0o750, exist_ok=True)
        path = self.manifest_path(identifier)
        with suppress(FileNotFoundError):
            shutil.copyfile(path, self._quarantine / path.name)

    def uses(self, digest: bytes) -> list[tuple[str, int]]:
        """Return where a chunk is used: images by identifier, each with the first index there."""
        found = []
        for identifier in self.identifiers():
            with suppress(NotFound, NotVerified):
                index = self.manifest(identifier).index_of(digest)
                if index is not None:
                    found.append((identifier, index))
        return found

    def sweep_manifests(self) -> None:
        """Remove half-written manifests and seals of nothing, seal what an older version did not."""
        for leftover in self._directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        there = set(self.identifiers())
        directory = self._state_dir / "seals"
        for path in directory.iterdir() if directory.exists() else ():
            if path.name not in there:  # a manifest that is made again has a new one
                path.unlink(missing_ok=True)
        for identifier in there:
            with suppress(NotVerified):
                self.seal(identifier)
