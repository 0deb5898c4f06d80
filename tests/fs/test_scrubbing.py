"""The scrubber: what it finds, that it pauses, and that it goes on where it was."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import trio
from support.damage import damage
from support.keep_daemon import ROOT, KeepDaemon, KeepHost

from stratocache.cache import seals
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.fs import cache_check, image_intents, offline_plan
from stratocache.fs.losses import losses
from stratocache.fs.scrubbing import request_scrub, scrub_state

CHUNKS = 8
SLOW_BYTES_PER_S = 2 * 1024**2


@pytest.fixture
def host(tmp_path: Path) -> Iterator[KeepHost]:
    """A host without a limit."""
    made = KeepHost(tmp_path)
    yield made
    made.close()


def _image(host: KeepHost, *, pin: bool = False) -> str:
    identifier = host.shelf.add(Random(1).randbytes(CHUNKS * CHUNK_BYTES))

    async def script(daemon: KeepDaemon) -> None:
        await daemon.end(image_intents.request_fetch(host.db, ROOT, identifier, pin=pin))
        await daemon.rest()

    host.run(script)
    return identifier


def _scrub(host: KeepHost) -> None:
    request_scrub(host.db, ROOT, "now")
    host.rest()


@pytest.mark.parametrize("kind", ["flip", "cut", "remove", "swap", "lengthen"])
@pytest.mark.parametrize("room", ["chunks", "manifests"])
def test_what_has_rotted_is_found_and_repaired(host: KeepHost, room: str, kind: str) -> None:
    """No reader is needed: the pass finds damage of either room, and everything is whole again."""
    identifier = _image(host)
    whole = {path: path.read_bytes() for path in host.chunk_files()}
    manifest = seals.manifest_path(host.configuration.state_dir, identifier)
    content = manifest.read_bytes()
    damage(host.configuration.state_dir, f"{room}-{kind}", Random(3))
    _scrub(host)
    assert {path: path.read_bytes() for path in host.chunk_files()} == whole
    assert manifest.read_bytes() == content
    state = scrub_state(host.db)
    assert (state.state, state.manifests) == ("idle", 1)
    assert state.damaged == state.repaired
    assert state.damaged > 0 or (room, kind) == ("manifests", "swap")
    assert cache_check.check(host.configuration, deep=True).faults == []


def test_what_cannot_be_repaired_is_an_alarm_until_it_can(host: KeepHost) -> None:
    """The loss is kept with its image, told once, named by the offline plan, and dropped when the
    origin is back."""
    identifier = _image(host, pin=True)
    host.shelf.take_away(identifier)
    host.chunk_files()[0].unlink()
    _scrub(host)
    _scrub(host)
    (loss,) = losses(host.db)
    assert (loss.kind, loss.images) == ("chunk", (identifier,))
    events = host.db.rows("SELECT 1 FROM events WHERE kind = 'chunk.lost'")
    assert len(events) == 1
    (weakness,) = offline_plan.weaknesses(host.configuration, host.db)
    assert (weakness.missing_chunks, weakness.missing_bytes) == (1, CHUNK_BYTES)
    host.shelf.bring_back(identifier)
    _scrub(host)
    assert losses(host.db) == []
    assert list(offline_plan.weaknesses(host.configuration, host.db)) == []


def test_a_paused_pass_goes_on_in_the_next_process(tmp_path: Path) -> None:
    """What was read before the pause is not read again, whatever process goes on."""
    host = KeepHost(tmp_path, bytes_per_s=SLOW_BYTES_PER_S)
    try:
        _image(host)
        request_scrub(host.db, ROOT, "now")

        async def begin(daemon: KeepDaemon) -> None:
            with trio.fail_after(60):
                while scrub_state(host.db).position is None:
                    await trio.lowlevel.checkpoint()
                request_scrub(host.db, ROOT, "pause")
                while not scrub_state(host.db).position:
                    daemon.wake()
                    await trio.sleep(0.01)

        host.run(begin)
        paused = scrub_state(host.db)
        assert paused.state == "paused"
        assert 0 < paused.chunks < CHUNKS
        for place in (0, CHUNKS - 1):
            path = host.chunk_files()[place]
            path.write_bytes(b"?" + path.read_bytes()[1:])
        request_scrub(host.db, ROOT, "resume")
        host.rest()
        ended = scrub_state(host.db)
        assert (ended.chunks, ended.damaged, ended.repaired) == (CHUNKS, 1, 1)
    finally:
        host.close()


def _hashers() -> list[int]:
    """Return the processes of ours that hash chunks."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with suppress(OSError):
                if b"chunk_hasher" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def test_chunks_are_hashed_by_a_process_that_gives_way_and_may_die(tmp_path: Path) -> None:
    """It runs when nobody else wants to; when it is killed the pass goes on, and finds what there is
    to find; none is left after the pass."""
    host = KeepHost(tmp_path, bytes_per_s=SLOW_BYTES_PER_S)
    schedulers: list[int] = []
    try:
        _image(host)
        request_scrub(host.db, ROOT, "now")

        async def script(daemon: KeepDaemon) -> None:
            with trio.fail_after(60):
                while not schedulers or schedulers[-1] != os.SCHED_IDLE:
                    await trio.sleep(0.01)
                    schedulers.extend(os.sched_getscheduler(pid) for pid in _hashers())
            (pid,) = _hashers()
            path = host.chunk_files()[-1]
            path.write_bytes(b"?" + path.read_bytes()[1:])
            os.kill(pid, signal.SIGKILL)
            await daemon.rest()

        host.run(script)
        ended = scrub_state(host.db)
        assert (ended.chunks, ended.damaged, ended.repaired) == (CHUNKS, 1, 1)
        assert _hashers() == []
    finally:
        host.close()


def test_orphans_and_strays_are_accounted_for(host: KeepHost) -> None:
    """Every kind of leftover is found, counted, and removed by a repair; what is needed stays."""
    identifier = _image(host)
    state_dir = host.configuration.state_dir
    strays = {
        "chunks/a/b/" + "ab" * 32: "orphan-chunk",
        "chunks/incoming/x": "unfinished-chunk",
        "chunks/readme": "unknown-file",
        "manifests/.x.caibx.tmp": "stray-manifest",
        "seals/x": "stray-seal",
        "stage/" + "A" * 27 + "/source.part": "stray-stage",
        "quarantine/" + "cd" * 32: "quarantined",
    }
    for name in strays:
        (state_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (state_dir / name).write_bytes(b"x" * 1000)
    report = cache_check.check(host.configuration)
    assert sorted(item.code for item in report.leaks) == sorted(strays.values())
    assert report.bytes["chunks"] == CHUNKS * CHUNK_BYTES
    repaired = cache_check.check(host.configuration, repair=True)
    assert (len(repaired.repaired), repaired.leaks) == (len(strays), [])
    assert [name for name in strays if (state_dir / name).exists()] == []
    after = cache_check.check(host.configuration, deep=True)
    assert (after.faults, after.leaks, after.chunks) == ([], [], CHUNKS)
    host.chunk_files()[0].unlink()
    faults = cache_check.check(host.configuration).faults
    assert [(item.code, item.subject) for item in faults] == [("chunk-missing", identifier)]
