"""`cache check`: every byte in the cache's rooms has a reason to be there, and every chunk that is
needed is there.

Reads files by their names alone. With the daemon stopped leftovers are looked for, and `repair`
removes what is safe; beside a running daemon files come and go, so only what is needed is checked.
"""

import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from stratocache.cache import seals
from stratocache.cache.chunkindex import INCOMING, chunk_file, is_digest
from stratocache.cache.chunks import DIGEST_BYTES
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, NotVerified
from stratocache.cache.manifest import Manifest
from stratocache.cache.stage import Stage
from stratocache.fs import pool
from stratocache.fs.disk_check import daemon_kept_away
from stratocache.fs.disk_repair import Finding, removal
from stratocache.fs.manifests import incomplete_manifests, named_manifests, published_manifests
from stratocache.fs.state import Database

ROOMS = ("chunks", "manifests", "seals", "stage", "quarantine")
"""The cache's rooms below the state directory; what is in them is accounted for to the byte."""

_CHUNK = re.compile(r"[0-9a-f]/[0-9a-f]/[0-9a-f]{64}")
_DISK_STAGE = "disk-"
_MISSING_NAMED_MAX = 3


@dataclass
class CacheReport:
    """What a check of the cache found."""

    bytes: dict[str, int] = field(default_factory=dict)
    """By kind: chunks, index, manifests, seals, orphan-chunks, incoming, stage, quarantine,
    unknown. Together they are all bytes of all files in the cache's rooms."""
    manifests: int = 0
    chunks: int = 0
    faults: list[Finding] = field(default_factory=list)
    """Needed bytes that are damaged or gone; reading or verifying the image repairs them."""
    leaks: list[Finding] = field(default_factory=list)
    """What costs space only."""
    repaired: list[Finding] = field(default_factory=list)
    """Leaks that are gone now."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and why."""


def check(configuration: Configuration, *, repair: bool = False, deep: bool = False) -> CacheReport:
    """Check the whole cache; `deep` hashes every chunk.

    Raises `Conflict` (`daemon-running`) for a repair beside a running daemon, and what mounting a
    pool raises.
    """
    with daemon_kept_away(configuration) as stopped:
        if not stopped:
            if repair:
                raise Conflict(
                    "daemon-running", "Stop the daemon to repair; without --repair it may run."
                )
            return _CacheCheck(configuration, stopped=False, deep=deep).run()
        with pool.available(configuration.state_dir):
            report = _CacheCheck(configuration, stopped=True, deep=deep).run()
    for finding in list(report.leaks) if repair else ():
        assert finding.mend is not None
        finding.mend()
        report.leaks.remove(finding)
        report.repaired.append(finding)
    return report


class _CacheCheck:
    """One run over one state directory."""

    def __init__(self, configuration: Configuration, *, stopped: bool, deep: bool) -> None:
        self._state_dir = configuration.state_dir
        self._database = configuration.database
        self._stopped = stopped
        self._deep = deep
        self._report = CacheReport()
        self._needed: dict[bytes, int] = {}
        self._awaited: set[bytes] = set()
        self._incomplete = False

    def run(self) -> CacheReport:
        named, published, incomplete = self._names()
        self._await(incomplete)
        self._check_manifests(published)
        for name in incomplete:
            self._needed = self._grown(name) | self._needed
        if self._stopped:
            self._account(named, self._coming())
        else:
            self._report.notes.append("The daemon runs: leftovers were not looked for.")
            for room in ROOMS:
                files = _files(self._state_dir / room)
                self._count(room, sum(size for _, size in files))
        return self._report

    def _names(self) -> tuple[set[str], set[str], set[str]]:
        """Return the manifests that something names, those that must have a file, and those whose
        chunks may be missing."""
        if not self._database.exists():
            return set(), set(), set()
        db = Database(self._database)
        with closing(db):
            return named_manifests(db), published_manifests(db), incomplete_manifests(db)

    def _await(self, incomplete: set[str]) -> None:
        """Remember which chunks may be missing: images' that are on their way, or were rejected."""
        for name in incomplete:
            with suppress(FileNotFoundError, NotVerified):
                self._awaited.update(seals.read_manifest(self._state_dir, name).stored())

    def _coming(self) -> set[str]:
        """Return the images that are on their way, whose downloads have a reason."""
        if not self._database.exists():
            return set()
        db = Database(self._database)
        with closing(db):
            rows = db.rows("SELECT id FROM images WHERE state IN ('fetching', 'provisional')")
            return {row["id"] for row in rows}

    def _grown(self, name: str) -> dict[bytes, int]:
        """Return the chunks, with their sizes, of an image whose manifest is still growing."""
        record = Stage(self._state_dir / "stage" / name).digests
        try:
            content = record.read_bytes()
        except FileNotFoundError:
            return {}
        digests = {content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES)}
        found = {}
        for digest in digests:
            with suppress(FileNotFoundError):
                found[digest] = chunk_file(self._state_dir / "chunks", digest).lstat().st_size
        return found

    def _check_manifests(self, published: set[str]) -> None:
        manifests = self._state_dir / "manifests"
        there = {path.stem for path in manifests.glob("[!.]*.caibx")}
        for name in sorted(published | there):
            try:
                manifest = seals.read_manifest(self._state_dir, name)
            except FileNotFoundError:
                if name in self._names()[1]:  # else it went meanwhile
                    path = seals.manifest_path(self._state_dir, name)
                    self._incomplete = True
                    self._fault("manifest-missing", name, f"{path} is missing.")
                continue
            except NotVerified as error:
                self._incomplete = True
                self._fault("manifest-damaged", name, error.message)
                continue
            self._report.manifests += 1
            self._check_chunks(name, manifest)

    def _check_chunks(self, name: str, manifest: Manifest) -> None:
        missing, corrupt = [], []
        for index in range(manifest.chunk_count):
            digest = manifest.digest(index)
            if manifest.is_zero(index) or digest in self._needed:
                continue
            size_bytes = self._needed[digest] = manifest.chunk_bytes(index)
            match self._look(digest, size_bytes):
                case "missing" if digest not in self._awaited:
                    missing.append(digest)
                case "corrupt":
                    corrupt.append(digest)
        for code, digests in (("chunk-missing", missing), ("chunk-corrupt", corrupt)):
            if digests:
                shown = ", ".join(
                    digest.hex()[:16] + "…" for digest in digests[:_MISSING_NAMED_MAX]
                )
                self._fault(
                    code, name,
                    f"{len(digests)} chunks of {name}: {shown}; `stratocache image verify` fetches "
                    "them again.",
                )  # fmt: skip

    def _look(self, digest: bytes, size_bytes: int) -> str:
        path = chunk_file(self._state_dir / "chunks", digest)
        try:
            if path.lstat().st_size != size_bytes:
                return "corrupt"
            if self._deep and hashlib.sha256(path.read_bytes()).digest() != digest:
                return "corrupt"
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "corrupt"
        self._report.chunks += 1
        return "right"

    def _account(self, named: set[str], coming: set[str]) -> None:
        """Find a reason for every file; what has none is a leak."""
        self._account_chunks()
        for room, suffix in (("manifests", seals.SUFFIX), ("seals", "")):
            for path, size_bytes in _files(self._state_dir / room):
                name = path.name.removesuffix(suffix)
                if path.name.endswith(suffix) and name in named:
                    self._count(room, size_bytes)
                else:
                    self._leak("unknown", f"stray-{room[:-1]}", path, size_bytes)
        for path in sorted((self._state_dir / "stage").glob("*")):
            size_bytes = _tree_bytes(path)
            # those of disks are `disk check`'s
            if path.name in coming or path.name.startswith(_DISK_STAGE):
                self._count("stage", size_bytes)
            else:
                self._leak("stage", "stray-stage", path, size_bytes)
        for path in sorted((self._state_dir / "quarantine").glob("*")):
            self._leak("quarantine", "quarantined", path, _tree_bytes(path))

    def _account_chunks(self) -> None:
        chunks = self._state_dir / "chunks"
        rows = dict(_index_rows(chunks / "cache.db"))
        for path, size_bytes in _files(chunks):
            relative = str(path.relative_to(chunks))
            if _CHUNK.fullmatch(relative):
                digest = bytes.fromhex(path.name)
                if digest in self._needed:
                    self._count("chunks", size_bytes)
                    if rows.pop(digest, None) is None:
                        self._report.notes.append(
                            f"{relative} has no row; the next start makes it."
                        )
                    continue
                rows.pop(digest, None)
                if self._incomplete:
                    self._count("orphan-chunks", size_bytes)
                else:
                    self._leak("orphan-chunks", "orphan-chunk", path, size_bytes)
            elif relative.startswith("cache.db"):
                self._count("index", size_bytes)
            elif relative.startswith(f"{INCOMING}/"):
                self._leak("incoming", "unfinished-chunk", path, size_bytes)
            else:
                self._leak("unknown", "unknown-file", path, size_bytes)
        if rows:
            self._report.notes.append(f"{len(rows)} rows have no chunk; the next start drops them.")
        if self._incomplete:
            self._report.notes.append(
                "Chunks stay while it is unknown which of them a manifest needs."
            )

    def _count(self, kind: str, size_bytes: int) -> None:
        self._report.bytes[kind] = self._report.bytes.get(kind, 0) + size_bytes

    def _leak(self, kind: str, code: str, path: Path, size_bytes: int) -> None:
        self._count(kind, size_bytes)
        message = f"{path} takes {size_bytes} bytes and nothing needs it."
        self._report.leaks.append(Finding(code, path.name, message, removal(path)))

    def _fault(self, code: str, subject: str, message: str) -> None:
        self._report.faults.append(Finding(code, subject, message))


def _files(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield everything below a directory that is none itself, with its length."""
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(folder, name)
            try:
                yield path, path.lstat().st_size
            except FileNotFoundError:
                continue


def _tree_bytes(path: Path) -> int:
    if stat.S_ISDIR(path.lstat().st_mode):
        return sum(size_bytes for _, size_bytes in _files(path))
    return path.lstat().st_size


def _index_rows(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the chunks that the index knows; a damaged one is made again at the next start."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as index:
            for key, size_bytes in index.execute("SELECT key, size FROM Cache"):
                if is_digest(key):
                    yield key, size_bytes
    except sqlite3.Error:
        return
