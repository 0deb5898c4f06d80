"""`disk check`: whether what is below disks/ is what the state database says, and whole.

With the daemon stopped everything is checked, and `repair` removes what a crash left. Beside a
running daemon nothing is changed, a disk that is open is checked as far as it holds still, and one
that changes meanwhile is left out with a note.
"""

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, Internal, NotFound, StratocacheError
from stratocache.fs import pool
from stratocache.fs.base_check import Bases
from stratocache.fs.disk_files_check import OLD_BITMAP, DiskCheck, Row
from stratocache.fs.disk_repair import Finding, removal
from stratocache.fs.layers import LAYOUT, DiskFiles
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.state import Database

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_STAGED = "disk-"
_NOT_OURS = frozenset({"lost+found"})


@dataclass
class Report:
    """What a check found."""

    disks: int = 0
    """Disks that were checked."""
    faults: list[Finding] = field(default_factory=list)
    """What may cost bytes; nothing of it is repaired here."""
    leaks: list[Finding] = field(default_factory=list)
    """What costs space only."""
    repaired: list[Finding] = field(default_factory=list)
    """Leaks that are gone now."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and why."""


def check(
    configuration: Configuration, *, uuid: str | None = None, repair: bool = False, deep: bool = False
) -> Report:  # fmt: skip
    """Check one disk or all; `deep` hashes every chunk that they need.

    Raises `NotFound` (`disk-unknown`), `Conflict` (`daemon-running`) for a repair beside a running
    daemon, `Internal` (`state-too-new`), and what mounting a pool raises.
    """
    with daemon_kept_away(configuration) as stopped:
        if repair and not stopped:
            raise Conflict(
                "daemon-running", "Stop the daemon to repair; without --repair it may run."
            )
        if stopped:
            with pool.available(configuration.state_dir):
                return _Check(configuration, stopped=True).run(uuid, repair=repair, deep=deep)
        return _Check(configuration, stopped=False).run(uuid, repair=False, deep=deep)


@contextmanager
def daemon_kept_away(configuration: Configuration) -> Iterator[bool]:
    """Hold the daemon's lock if no daemon has it, and tell."""
    directory = RunDirectory(configuration.run_dir)
    directory.prepare()
    lock = directory.lock()
    try:
        lock.__enter__()
    except Conflict:
        yield False
        return
    try:
        yield True
    finally:
        lock.__exit__(None, None, None)


class _Check:
    """One run over one state directory."""

    def __init__(self, configuration: Configuration, *, stopped: bool) -> None:
        self._state_dir = configuration.state_dir
        self._disks = configuration.state_dir / "disks"
        self._live = configuration.run_dir / "live"
        self._stopped = stopped
        self._bases = Bases(configuration.state_dir)
        self._report = Report()
        self._db = Database(configuration.database) if configuration.database.exists() else None

    def run(self, uuid: str | None, *, repair: bool, deep: bool) -> Report:
        report = self._report
        try:
            if not self._stopped:
                report.notes.append("The daemon runs: leftovers were not looked for.")
            rows = self._rows(
                "SELECT * FROM disks WHERE ? IN ('', uuid) ORDER BY number", uuid or ""
            )
            if uuid is not None and not rows:
                raise NotFound(
                    "disk-unknown", f"No disk {uuid[:80]}; `stratocache disk ls` lists yours."
                )
            for row in rows:
                self._check_disk(row)
            if uuid is None:
                self._keep(self._check_strangers())
                self._keep(self._check_snapshots())
            provisional = self._rows("SELECT id FROM images WHERE state = 'provisional'")
            self._bases.incomplete = [row["id"] for row in provisional]
            self._keep(
                finding
                for finding in self._bases.check(deep=deep)
                if self._stopped or self._needed(finding.subject)
            )
        finally:
            if self._db is not None:
                self._db.close()
        if repair:
            _repair(report)
        return report

    def _rows(self, query: str, *values: str) -> list[Row]:
        if self._db is None:
            return []
        version: int = self._db.connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise Internal(
                "state-too-new",
                f"{self._db.path} was written by a newer Stratocache; check with that version.",
            )
        try:
            return [dict(row) for row in self._db.rows(query, *values)]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # an older schema: there is nothing of that kind
                return []
            raise

    def _keep(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if not finding.leak:
                self._report.faults.append(finding)
            elif self._stopped:
                self._report.leaks.append(finding)

    def _check_disk(self, row: Row) -> None:
        uuid = row["uuid"]
        busy = self._busy(uuid)
        if row["state"] != "available" or (busy and not self._stopped):
            self._report.notes.append(f"Disk {uuid} is being changed and was not checked.")
            return
        files = DiskFiles(self._disks / uuid, self._live / uuid)
        open_before, layout_before = self._is_open(files), _layout(files)
        snapshots = self._rows("SELECT * FROM snapshots WHERE disk_uuid = ?", uuid)
        bases = Bases(self._state_dir)
        # one that is being taken or absorbed changes the disk's files before its row
        settled = not self._stopped and all(item["state"] == "available" for item in snapshots)
        disk = DiskCheck(row, snapshots, files, self._live, bases, settled=settled)
        try:
            findings = list(disk.findings(in_use=open_before))
        except StratocacheError as error:
            findings = [Finding(_code(error), uuid, error.message)]
        except OSError as error:
            findings = [Finding("disk-unreadable", uuid, f"Disk {uuid}: {error}.")]
        if not self._stopped:
            before = ([row], snapshots, open_before, layout_before, False)
            after = (
                self._rows("SELECT * FROM disks WHERE uuid = ?", uuid),
                self._rows("SELECT * FROM snapshots WHERE disk_uuid = ?", uuid),
                self._is_open(files),
                _layout(files),
                self._busy(uuid),
            )
            if before != after:
                self._report.notes.append(
                    f"Disk {uuid} changed while it was checked; again, please."
                )
                return
            if open_before:
                self._report.notes.append(f"Disk {uuid} is open; its blocks were not checked.")
        self._report.disks += 1
        self._bases.need_all(bases)
        faults = [finding for finding in findings if not finding.leak]
        # what looks like a leak may be all that is left: a disk with a fault stays as it is
        self._keep(faults or findings)

    def _busy(self, uuid: str) -> bool:
        query = "SELECT id FROM operations WHERE subject = ? AND state IN ('pending', 'running')"
        return bool(self._rows(query, uuid))

    def _needed(self, manifest: str) -> bool:
        """Whether a row still names a manifest that was needed a moment ago."""
        return bool(
            self._rows("SELECT uuid FROM disks WHERE ? IN (base_manifest, base_image)", manifest)
            or self._rows("SELECT id FROM snapshots WHERE id = ?", manifest)
        )

    def _is_open(self, files: DiskFiles) -> bool:
        """Whether the daemon has an overlay open: it then holds its bitmap's lock (flock(2)).

        Looked up, not tried: trying would keep the daemon from opening it.
        """
        if self._stopped or not files.directory.is_dir():
            return False
        held = _locked_files()
        bitmaps = (files.directory.glob(pattern) for pattern in (f"*.{OLD_BITMAP}", OLD_BITMAP))
        return any(path.stat().st_ino in held for found in bitmaps for path in found)

    def _check_strangers(self) -> Iterator[Finding]:
        """Find disks that no row names, and what a crash left in the stage and of live bitmaps."""
        found = sorted(os.listdir(self._disks)) if self._disks.is_dir() else []
        known = {row["uuid"] for row in self._rows("SELECT uuid FROM disks")}
        if self._db is None and found:
            self._report.notes.append("There is no state database; disks/ was not checked.")
            return
        for name in found:
            if name in known or name in _NOT_OURS or not (self._disks / name).exists():
                continue
            what = (
                "is a disk that the state database does not know; the daemon removes it at its "
                "next start, so copy it elsewhere before if it is wanted"
                if _UUID.fullmatch(name)
                else "is no disk"
            )
            yield Finding("disk-unknown", name, f"{self._disks / name} {what}.")
        for path in sorted((self._state_dir / "stage").glob(f"{_STAGED}*")):
            if _UUID.fullmatch(path.name.removeprefix(_STAGED)):
                yield Finding(
                    "stage-leftover", path.name, f"{path} was never finished.", removal(path)
                )  # fmt: skip
        for path in sorted(self._live.glob("*.bitmap*")):
            if path.name.partition(".")[0] not in known:
                yield Finding(
                    "live-bitmap-stale", path.name, f"{path} is of no disk.", removal(path)
                )  # fmt: skip

    def _check_snapshots(self) -> Iterator[Finding]:
        """Find snapshots of disks that are gone."""
        query = (
            "SELECT id, disk_uuid FROM snapshots WHERE disk_uuid NOT IN (SELECT uuid FROM disks)"
        )
        for row in self._rows(query):
            yield Finding(
                "snapshot-orphaned", row["id"],
                f"Snapshot {row['id']} is of disk {row['disk_uuid']}, which is gone.",
            )  # fmt: skip


def _repair(report: Report) -> None:
    for leak in report.leaks:
        assert leak.mend is not None
        leak.mend()
    report.repaired, report.leaks = report.leaks, []


def _layout(files: DiskFiles) -> bytes | None:
    try:
        return (files.directory / LAYOUT).read_bytes()
    except OSError:
        return None


def _locked_files() -> set[int]:
    """Return the inode numbers of files under flock(2), from /proc/locks (proc(5))."""
    held = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields: Sequence[str] = line.split()
        if "FLOCK" in fields:
            held.add(int(fields[-3].rpartition(":")[2]))
    return held


def _code(error: StratocacheError) -> str:
    return "layout-damaged" if error.code == "overlay-damaged" else error.code
