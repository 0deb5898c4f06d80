"""Checks of manifests that disks and snapshots are built on, and of the chunks they name.

Reads files by their names alone: the chunk store belongs to one process, which may be running.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.chunkindex import chunk_file
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.fs.disk_repair import Finding

_NAMED_MAX = 3


@dataclass
class Bases:
    """The manifests that were met, with who needs each; every one is checked once."""

    state_dir: Path
    users: dict[str, list[str]] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    """Manifests of images that are still being fetched: their chunks may be missing."""

    def need(self, name: str, user: str) -> None:
        """Remember that a disk or snapshot needs a manifest."""
        self.users.setdefault(name, []).append(user)

    def need_all(self, others: "Bases") -> None:
        """Remember what others remember."""
        for name, users in others.users.items():
            self.users.setdefault(name, []).extend(users)

    def check(self, *, deep: bool) -> Iterator[Finding]:
        """Yield what is wrong with the manifests and their chunks; `deep` hashes every chunk."""
        seen: dict[bytes, bool] = {}
        awaited = self._awaited()
        for name, users in sorted(self.users.items()):
            path = self.state_dir / "manifests" / f"{name}.caibx"
            try:
                manifest = seals.read_manifest(self.state_dir, name)
            except FileNotFoundError:
                if name in self.incomplete:
                    continue  # one without an index has it when all of it has flowed past
                yield Finding(
                    "base-missing", name, f"{path} is missing; {_needed(users)}: restore it."
                )
                continue
            except NotVerified as error:
                yield Finding("base-damaged", name, f"{error.message} {_needed(users)}.")
                continue
            yield from self._check_chunks(name, manifest, users, seen, awaited, deep=deep)

    def _awaited(self) -> set[bytes]:
        found: set[bytes] = set()
        for name in self.incomplete:
            with suppress(FileNotFoundError, NotVerified):
                found.update(seals.read_manifest(self.state_dir, name).stored())
        return found

    def _check_chunks(
        self, name: str, manifest: Manifest, users: list[str], seen: dict[bytes, bool],
        awaited: set[bytes], *, deep: bool,
    ) -> Iterator[Finding]:  # fmt: skip
        missing, corrupt = [], []
        for digest in dict.fromkeys(manifest.stored()):
            path = chunk_file(self.state_dir / "chunks", digest)
            try:
                size_bytes = path.stat().st_size
            except FileNotFoundError:
                if digest not in awaited:
                    missing.append(digest)
                continue
            if digest not in seen:
                seen[digest] = 0 < size_bytes <= CHUNK_BYTES and not (
                    deep and hashlib.sha256(path.read_bytes()).digest() != digest
                )
            if not seen[digest]:
                corrupt.append(digest)
        if missing:
            yield Finding(
                "base-chunk-missing", name,
                f"{_chunks(missing)} of {name} not in the store; {_needed(users)}: fetch it again.",
            )  # fmt: skip
        if corrupt:
            yield Finding(
                "base-chunk-corrupt", name,
                f"{_chunks(corrupt)} of {name} not what the digest says; {_needed(users)}: fetch "
                "it again.",
            )  # fmt: skip


def _needed(users: Sequence[str]) -> str:
    more = f" and {len(users) - _NAMED_MAX} more" if len(users) > _NAMED_MAX else ""
    return f"needed by {', '.join(users[:_NAMED_MAX])}{more}"


def _chunks(digests: Sequence[bytes]) -> str:
    verb = "is" if len(digests) == 1 else "are"
    return (
        f"{len(digests)} chunk{'s' if len(digests) > 1 else ''} ({digests[0].hex()[:16]}…) {verb}"
    )
