"""An I/O error, and a full disk, at each call in turn, on real files.

Each operation on disks is done once for each file call that it makes, and that call fails: with EIO,
then with ENOSPC. The operation must end, done or with an error; then every disk and snapshot has the
bytes that this outcome says, before and after the next process has looked at them; `disk check` finds
no fault; and what failed can be done again. The daemon may not die of it. Only a sync of an overlay's
data that fails is not forgiven: that flush and every later one is refused until the host boots.

`make test` lets a sample of the calls fail, `make crash` each.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest.mock import patch
from uuid import uuid4

import pytest
import trio
from support.disk_daemon import IMAGE, ROOT, DiskDaemon, DiskHost
from support.failing_calls import CODES, FailingCalls

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import disk_check, disk_intents, inventory, snapshot_intents, snapshots
from stratocache.fs.operation_intents import add_operation
from stratocache.fs.records import DiskRequest, Operation, SaveRequest
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.stack import Layer

EVERY_CALL = "CRASH_ROUNDS" in os.environ
SAMPLE_STEP = 29
LOST = "flush-failed"
CALLS_MAX = 2000
WAITING_S = 20
PLANTED_MAX = 200
"""Failing calls within which a planted bug must be found."""
CONTENT = Random(3).randbytes(CHUNK_BYTES + 9000)
SIZE_BYTES = 3 * CHUNK_BYTES + 512
GROWN_BYTES = 4 * CHUNK_BYTES + 100


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Errors are what these tests are made of, and what is tried again need not wait."""
    logging.disable(logging.CRITICAL)
    with patch.object(snapshots, "_RETRY_S", 0.01):
        yield
    logging.disable(logging.NOTSET)


@dataclass
class Contents:
    """What there is: disks and snapshots with their bytes."""

    disks: dict[str, bytes] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def copy(self) -> "Contents":
        """Return the same, to be changed."""
        return Contents(dict(self.disks), dict(self.snapshots))


Deed = Callable[["Site"], Operation]
"""Asks for something."""


@dataclass
class Site:
    """A host with an overlay that has a snapshot, a raw disk, and one to be deleted."""

    host: DiskHost
    contents: Contents
    overlay: str
    raw: str
    doomed: str
    snapshot: str
    deaths: int = 0

    def perform(self, deed: Deed, calls: FailingCalls | None = None) -> "Outcome":
        """Let the daemon do a deed, and let calls fail meanwhile; it may not die of that."""
        outcome: list[Operation | OSError] = []
        rested: list[bool] = []

        async def script(daemon: DiskDaemon) -> None:
            await daemon.rest()
            with calls.armed() if calls is not None else nullcontext():
                try:
                    outcome.append(deed(self))
                except OSError as error:
                    outcome.append(error)
                # a snapshot of writes that are lost waits for the host to boot
                with trio.move_on_after(WAITING_S):
                    await daemon.rest()
            rested.append(True)

        try:
            self.host.run(script)
        except* OSError:
            # its orderly end may tell of a flush that failed before
            assert rested, "the daemon died"
        asked = outcome[0]
        return (
            inventory.operation(self.host.db, asked.id) if isinstance(asked, Operation) else asked
        )

    def done(self, deed: Deed) -> str:
        """Do a deed, which must succeed; return its subject."""
        outcome = self.perform(deed)
        assert isinstance(outcome, Operation) and outcome.state == "done", outcome
        return outcome.subject


Outcome = Operation | OSError | None
"""An operation that has ended, or the error of a request; None for a guest's that was answered."""


def _create_blank(site: Site) -> Operation:
    return disk_intents.create_disk(site.host.db, ROOT, DiskRequest(size_bytes=SIZE_BYTES))


def _create_clone(site: Site) -> Operation:
    """Make a clone of the image, as the operation of a reference would."""
    request = DiskRequest(size_bytes=SIZE_BYTES)
    uuid = str(uuid4())
    with site.host.db.transaction() as connection:
        disk_intents.insert_disk(
            connection, "root", uuid, request, base_image=IMAGE, base_manifest=IMAGE
        )
        return add_operation(connection, ROOT, "create-disk", uuid, {})


def _clone(site: Site) -> Operation:
    request = DiskRequest(snapshot=site.snapshot)
    return disk_intents.create_disk(site.host.db, ROOT, request)


def _snapshot(site: Site, uuid: str) -> Operation:
    return snapshot_intents.create_snapshot(site.host.db, ROOT, uuid)


def _roll_back(site: Site) -> Operation:
    return snapshot_intents.rollback(site.host.db, ROOT, site.overlay, site.snapshot)


def _grow(site: Site, uuid: str) -> Operation:
    return disk_intents.resize_disk(site.host.db, ROOT, uuid, GROWN_BYTES)


def _hydrate(site: Site) -> Operation:
    return disk_intents.hydrate_disk(site.host.db, ROOT, site.overlay)


def _save(site: Site) -> Operation:
    request = SaveRequest(title="saved")
    return snapshot_intents.save_disk(site.host.db, ROOT, site.overlay, request)


def _delete(site: Site) -> Operation:
    return disk_intents.delete_disk(site.host.db, ROOT, site.doomed)


def _delete_snapshot(site: Site) -> Operation:
    return snapshot_intents.delete_snapshot(site.host.db, ROOT, site.overlay, site.snapshot)


PIECES = [(100, 5000), (CHUNK_BYTES - 700, 4000), (SIZE_BYTES - 300, 300), (2 * CHUNK_BYTES, 8192)]
"""Writes that begin and end anywhere, one across chunks, one at the end of the disk."""


def _written(before: bytes, count: int) -> bytes:
    content = bytearray(before)
    for offset, size in PIECES[:count]:
        content[offset : offset + size] = b"w" * size
    return bytes(content)


def _guest(site: Site) -> OSError | None:
    """Write and flush as a guest does, up to the first error."""
    try:
        for offset, size in PIECES:
            site.host.write(site.overlay, offset, b"w" * size)
    except OSError as error:
        return error
    return None


DEEDS: dict[str, Deed] = {
    "create-blank": _create_blank,
    "create-clone": _create_clone,
    "clone-snapshot": _clone,
    "snapshot-overlay": lambda site: _snapshot(site, site.overlay),
    "snapshot-raw": lambda site: _snapshot(site, site.raw),
    "rollback": _roll_back,
    "grow-overlay": lambda site: _grow(site, site.overlay),
    "grow-raw": lambda site: _grow(site, site.raw),
    "hydrate": _hydrate,
    "save": _save,
    "delete": _delete,
    "delete-snapshot": _delete_snapshot,
}
GUEST = "write-and-flush"


def _after(name: str, site: Site, outcome: Outcome) -> Contents:
    """Return what there must be after a deed that was done."""
    contents = site.contents.copy()
    disks = contents.disks
    subject = outcome.subject if outcome is not None and not isinstance(outcome, OSError) else ""
    if name == "create-blank":
        disks[subject] = bytes(SIZE_BYTES)
    elif name == "create-clone":
        disks[subject] = CONTENT.ljust(SIZE_BYTES, b"\0")
    elif name == "clone-snapshot":
        disks[subject] = contents.snapshots[site.snapshot]
    elif name in ("snapshot-overlay", "snapshot-raw"):
        uuid = site.overlay if name == "snapshot-overlay" else site.raw
        contents.snapshots[subject] = disks[uuid]
    elif name == "rollback":
        disks[site.overlay] = contents.snapshots[site.snapshot]
    elif name in ("grow-overlay", "grow-raw"):
        disks[subject] = disks[subject].ljust(GROWN_BYTES, b"\0")
    elif name == "delete":
        del disks[site.doomed]
    elif name == "delete-snapshot":
        del contents.snapshots[site.snapshot]
    elif name == "write-and-flush":
        disks[site.overlay] = _written(disks[site.overlay], len(PIECES))
    return contents


def _found(site: Site) -> Contents:
    """Return what there is, as a new process reads it."""
    host = site.host
    rows = host.db.rows("SELECT uuid FROM disks")
    found = Contents({row["uuid"]: host.content(row["uuid"]) for row in rows})
    for row in host.db.rows("SELECT * FROM snapshots WHERE state = 'available'"):
        if row["form"] == "file":
            path = host.disks().raw_snapshot_path(row["disk_uuid"], row["id"])
            found.snapshots[row["id"]] = path.read_bytes()
        else:
            reader = host.images().reader(row["id"])
            found.snapshots[row["id"]] = reader.read_blocking(0, reader.size_bytes)
    return found


def _is_permitted(name: str, site: Site, outcome: Outcome, found: Contents) -> bool:
    if outcome is None or (isinstance(outcome, Operation) and outcome.state == "done"):
        return found == _after(name, site, outcome)
    if isinstance(outcome, Operation):
        return found == site.contents
    if name != GUEST:
        return found == site.contents
    # of a guest's request that failed any sector may be there
    disk, before = found.disks[site.overlay], site.contents.disks[site.overlay]
    others = {**found.disks, site.overlay: before}
    return Contents(others, found.snapshots) == site.contents and any(
        _each_sector_of(disk, _written(before, count), _written(before, count + 1))
        for count in range(len(PIECES))
    )


def _each_sector_of(found: bytes, old: bytes, new: bytes) -> bool:
    return len(found) == len(old) and all(
        found[start : start + 512] in (old[start : start + 512], new[start : start + 512])
        for start in range(0, len(found), 512)
    )


class Template:
    """A site that was prepared once and is copied for each case."""

    def __init__(self, root: Path) -> None:
        self._root = root / "case"
        self._copy = root / "template"
        self._root.mkdir(parents=True)
        host = self._host()
        host.publish(CONTENT)
        made = Site(host, Contents(), "", "", "", "")
        made.overlay = made.done(_create_clone)
        host.write(made.overlay, 5000, b"a" * 20_000)
        made.snapshot = made.done(DEEDS["snapshot-overlay"])
        host.write(made.overlay, CHUNK_BYTES - 100, b"b" * 5000)
        made.raw = made.done(_create_blank)
        host.write(made.raw, 4000, b"raw" * 4000)
        made.doomed = made.done(_create_clone)
        host.write(made.doomed, 0, b"doomed")
        made.contents = _found(made)
        host.close()
        self._site = made
        self._root.rename(self._copy)

    def _host(self) -> DiskHost:
        RunDirectory(self._root / "run").prepare()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        (self._root / "run" / "boot-id").write_text(boot)
        return DiskHost(self._root, self._root / "state")

    def site(self) -> Site:
        """Return a site of its own; close its host."""
        shutil.rmtree(self._root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", self._copy, self._root], check=True)
        old = self._site
        return Site(self._host(), old.contents, old.overlay, old.raw, old.doomed, old.snapshot)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A prepared site."""
    return Template(tmp_path_factory.mktemp("io-errors"))


@dataclass
class Tally:
    """What came of the cases of one deed."""

    calls: int = 0
    cases: int = 0
    refused: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.cases} of them failed, {self.refused} operations refused, "
            f"{self.lost} lost syncs remembered"
        )


def _play(template: Template, name: str, number: int, code: int, tally: Tally) -> bool:
    """Do a deed with one failing call, and judge; False when there was no call of that number."""
    site = template.site()
    places = [site.host.configuration.state_dir, site.host.configuration.run_dir / "live"]
    calls = FailingCalls(places, number, code)
    try:
        outcome: Outcome
        if name == GUEST:
            with calls.armed():
                outcome = _guest(site)
        else:
            outcome = site.perform(DEEDS[name], calls)
        tally.calls = calls.count
        if calls.failed is None:
            return False
        tally.cases += 1
        what = f"{name}, call {number}, {os.strerror(code)}, {calls.failed}: {outcome}"
        assert _is_permitted(name, site, outcome, _found(site)), what
        if _is_lost_sync(site, calls.failed):
            assert outcome is not None, what
            _require_refusals(site, what)
            tally.lost += 1
            return True
        assert not isinstance(outcome, Operation) or outcome.finished, what
        site.host.rest()
        assert _is_permitted(name, site, outcome, _found(site)), f"{what}, in the next process"
        assert disk_check.check(site.host.configuration).faults == [], what
        if name != GUEST and not (isinstance(outcome, Operation) and outcome.state == "done"):
            tally.refused += 1
            again = site.perform(DEEDS[name])
            assert isinstance(again, Operation) and again.state == "done", f"{what}, again {again}"
            assert _found(site) == _after(name, site, again), f"{what}, again"
    finally:
        site.host.close()
    return True


def _is_lost_sync(site: Site, failed: str) -> bool:
    call, _, path = failed.partition(" of ")
    # an fsync of layer 3 is the last step of making it, and is done again with a new file
    synced = call == "fdatasync" or (call == "fsync" and path.endswith("/2.data"))
    return synced and f"/{site.overlay}/" in path and path.endswith(".data")


def _require_refusals(site: Site, what: str) -> None:
    """After a lost sync of a layer the disk is readable, and what it has is said to be in doubt."""
    faults = disk_check.check(site.host.configuration).faults
    assert [fault.code for fault in faults] == [LOST], what
    for _ in range(2):
        with pytest.raises(OSError, match="earlier flush"):
            site.host.write(site.overlay, 0, b"")


@pytest.mark.timeout(7200 if EVERY_CALL else 300)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", [*DEEDS, GUEST])
def test_error_at_every_call(
    template: Template, name: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever call fails, the operation is done or refused and no byte is another's."""
    tally = Tally()
    # the first call, and another sample of the rest for each operation and error
    second = 1 if EVERY_CALL else 1 + Random(f"{name} {code}").randrange(SAMPLE_STEP)
    for number in (0, *range(second, CALLS_MAX, 1 if EVERY_CALL else SAMPLE_STEP)):
        if not _play(template, name, number, CODES[code], tally):
            break
    else:
        pytest.fail("the operation never ends")
    with capsys.disabled():
        print(f"\n{name}, {code}: {tally}")


def _swallow(layer: Layer, pages: dict[int, bytes]) -> None:
    with suppress(OSError):
        layer.data.fdatasync()
    layer.bitmap.write(layer._durable, pages)


def _forget(layer: Layer, error: OSError) -> None:
    pass


@pytest.mark.parametrize("bug", ["swallowed", "forgotten"])
def test_planted_bug_is_found(
    bug: str, template: Template, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """An engine that swallows the error of a sync, or forgets it, is found out."""
    if bug == "swallowed":
        monkeypatch.setattr(Layer, "_sync", _swallow)
    else:
        monkeypatch.setattr(Layer, "_remember_loss", _forget)
    tally = Tally()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        for number in range(PLANTED_MAX):
            assert _play(template, GUEST, number, CODES["EIO"], tally), "not found"
    with capsys.disabled():
        print(f"\n{bug}: found after {tally.cases} failing calls")
    assert tally.cases <= PLANTED_MAX


START_STEP = 1 if EVERY_CALL else 79
START_DEATHS_MAX = 10
"""A start may die where a directory that all disks need cannot be made or read."""


def test_error_at_every_call_of_a_start(
    template: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon that meets an error when it starts may die of it; the next one finds all it needs."""
    deaths = 0
    for number in range(0, CALLS_MAX, START_STEP):
        site = template.site()
        calls = FailingCalls([site.host.configuration.state_dir], number, CODES["EIO"])
        try:
            try:
                with calls.armed():
                    site.host.rest()
            except* OSError:
                deaths += 1
            site.host.rest()
            assert _found(site) == site.contents, calls.failed
            report = disk_check.check(site.host.configuration)
            assert report.faults == [], calls.failed
        finally:
            site.host.close()
        if calls.failed is None:
            break
    with capsys.disabled():
        print(f"\nstart: {calls.count} calls, {-(-number // START_STEP)} failed, {deaths} deaths")
    assert deaths <= START_DEATHS_MAX
