"""`disk check`: every kind of damage is named, only leaks are removed, nothing else is touched."""

import fcntl
import os
import shutil
import struct
import tempfile
import uuid as uuid_module
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from support.appliance import Appliance
from support.images import store_image
from support.publishing import publish_image

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Conflict, NotFound
from stratocache.cache.images import ImageStore
from stratocache.fs import bitmap, disk_check
from stratocache.fs.disk_check import Report
from stratocache.fs.layer_check import boot_id
from stratocache.fs.layers import DiskFiles, Layout
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.state import Database, now

MIB = 1024**2
BLOCK = 4096
BASE = "B" * 27
SIZE = 3 * MIB + 512
"""Not a multiple of anything."""


def header(size_bytes: int, generation: bytes, boot: bytes = bytes(16)) -> bytes:
    """Return a bitmap's header page, packed from its description."""
    fields = struct.pack("<8sIIQ16s16s", b"stratobm", 1, 4096, size_bytes, generation, boot)
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(4096, b"\0")


class Bench:
    """A state directory whose rows and files are written one by one."""

    def __init__(self, root: Path) -> None:
        self.configuration = Configuration(state_dir=root / "state", run_dir=root / "run")
        self.state_dir = root / "state"
        self.state_dir.mkdir()
        RunDirectory(root / "run").prepare()
        self.live = root / "run" / "live"
        (root / "run" / "boot-id").write_text(Path("/proc/sys/kernel/random/boot_id").read_text())
        self.db = Database(self.configuration.database)
        self.db.migrate()
        for name in ("disks", "stage"):
            (self.state_dir / name).mkdir()
        self.generation = uuid_module.uuid4().bytes

    def publish_base(self) -> bytes:
        """Publish an image of two chunks and one of zeros; return its content."""
        content = Random(1).randbytes(2 * CHUNK_BYTES) + bytes(CHUNK_BYTES) + b"end"
        chunks = ChunkStore(self.state_dir / "chunks")
        store_image(ImageStore(self.state_dir, chunks), BASE, content)
        chunks.close()
        return content

    def row(self, form: str, base: str | None = None, size_bytes: int = SIZE) -> str:
        """Insert a disk; return its UUID."""
        uuid = str(uuid_module.uuid4())
        self.db.connection.execute(
            "INSERT INTO disks (uuid, state, size_bytes, form, owner, visibility, kind, volatile, "
            "base_manifest, created_at) "
            "VALUES (?, 'available', ?, ?, 'root', 'private', 'data', 0, ?, ?)",
            (uuid, size_bytes, form, base, now()),
        )
        return uuid

    def raw(self) -> str:
        """Make a raw disk."""
        uuid = self.row("raw")
        self.directory(uuid).mkdir()
        with (self.directory(uuid) / "data").open("wb") as file:
            file.truncate(SIZE)
        return uuid

    def overlay(self, blocks: tuple[int, ...] = (0, 5), frozen: bool = False) -> str:
        """Make an overlay with a live bitmap, some blocks of which are its own."""
        if not (self.state_dir / "manifests").exists():
            self.publish_base()
        uuid = self.row("overlay", BASE)
        self.directory(uuid).mkdir()
        self.layer(uuid, "2", blocks)
        if frozen:
            self.layer(uuid, "1", (1, 2))
        layout = Layout(SIZE, "2", "1" if frozen else None, SIZE if frozen else None, BASE)
        self.files(uuid).write_layout(layout)
        return uuid

    def layer(self, uuid: str, name: str, blocks: tuple[int, ...]) -> None:
        """Write a layer's three files."""
        files = self.files(uuid)
        self.write_layer(files.data(name), files.bitmap(name), files.live(name), blocks)

    def write_layer(self, data: Path, durable: Path, live: Path, blocks: tuple[int, ...]) -> None:
        """Write three files; each block's bit is in both bitmaps."""
        with data.open("wb") as file:
            for block in blocks:
                file.seek(block * BLOCK)
                file.write(b"written".ljust(min(BLOCK, SIZE - block * BLOCK), b"."))
            file.truncate(SIZE)
        bits = sum(1 << block for block in blocks).to_bytes(
            bitmap.file_bytes(SIZE) - 4096, "little"
        )
        durable.write_bytes(header(SIZE, self.generation) + bits)
        live.write_bytes(header(SIZE, self.generation, boot_id()) + bits)

    def set_bit(self, path: Path, block: int) -> None:
        """Set one block's bit in a bitmap."""
        content = bytearray(path.read_bytes())
        content[4096 + block // 8] |= 1 << block % 8
        path.write_bytes(content)

    def directory(self, uuid: str) -> Path:
        """Return a disk's directory."""
        return self.state_dir / "disks" / uuid

    def files(self, uuid: str) -> DiskFiles:
        """Return a disk's files."""
        return DiskFiles(self.directory(uuid), self.live / uuid)

    def check(self, uuid: str | None = None, *, repair: bool = False, deep: bool = False) -> Report:
        """Check with the daemon stopped."""
        return disk_check.check(self.configuration, uuid=uuid, repair=repair, deep=deep)

    def contents(self) -> dict[str, bytes]:
        """Return all files below disks/, stage/ and live/."""
        roots = (self.state_dir / "disks", self.state_dir / "stage", self.live)
        return {
            str(path): path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()
        }  # fmt: skip


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A state directory of a test's own."""
    with tempfile.TemporaryDirectory(prefix="sc-check-") as root:
        made = Bench(Path(root))
        yield made
        made.db.close()


def codes(report: Report) -> tuple[list[str], list[str]]:
    """Return the codes of a report's faults and leaks."""
    return [item.code for item in report.faults], [item.code for item in report.leaks]


def snapshot(bench: Bench, uuid: str, form: str) -> str:
    """Insert an available snapshot; return its id."""
    name = str(uuid_module.uuid4())
    bench.db.connection.execute(
        "INSERT INTO snapshots (id, disk_uuid, state, form, size_bytes, owner, created_at) "
        "VALUES (?, ?, 'available', ?, ?, 'root', ?)",
        (name, uuid, form, SIZE, now()),
    )
    return name


def test_whole_disks_are_clean(bench: Bench) -> None:
    """Raw disks, overlays with and without a frozen layer, and old overlays have no fault."""
    bench.raw()
    bench.overlay()
    bench.overlay(frozen=True)
    bench.overlay(blocks=(0, SIZE // BLOCK))
    old = bench.row("overlay", BASE)
    bench.directory(old).mkdir()
    files = bench.files(old)
    bench.write_layer(
        files.directory / "data", files.directory / "bitmap", files.first_live, (3, 4)
    )  # fmt: skip
    before = bench.contents()
    report = bench.check(repair=True, deep=True)
    assert codes(report) == ([], [])
    assert (report.disks, report.repaired, report.notes) == (5, [], [])
    assert bench.contents() == before


def test_no_state_is_clean(bench: Bench) -> None:
    """Nothing there is nothing wrong."""
    assert bench.check().disks == 0
    with pytest.raises(NotFound) as caught:
        bench.check(str(uuid_module.uuid4()))
    assert caught.value.code == "disk-unknown"


def _cut(path: Path, size_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size_bytes)


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


OVERLAY_DAMAGE: dict[str, tuple[Callable[[DiskFiles], object], str]] = {
    "no layout's checksum": (
        lambda f: _flip(f.directory / "layout.json", 40), "layout-damaged"),
    "layout empty": (
        lambda f: (f.directory / "layout.json").write_bytes(b""), "layout-damaged"),
    "layout gone": (lambda f: (f.directory / "layout.json").unlink(), "data-missing"),
    "layout gone above a raw layer": (
        lambda f: (f.directory / "layout.json").rename(f.directory / "data"), "layout-missing"),
    "bitmap gone": (lambda f: f.bitmap("2").unlink(), "bitmap-damaged"),
    "bitmap's magic": (lambda f: _flip(f.bitmap("2"), 0), "bitmap-damaged"),
    "bitmap's size": (lambda f: _flip(f.bitmap("2"), 16), "bitmap-damaged"),
    "bitmap's checksum": (lambda f: _flip(f.bitmap("2"), 57), "bitmap-damaged"),
    "bitmap cut in the header": (lambda f: _cut(f.bitmap("2"), 100), "bitmap-damaged"),
    "bitmap cut in the bits": (lambda f: _cut(f.bitmap("2"), 4096), "bitmap-damaged"),
    "bit behind the end": (lambda f: _flip(f.bitmap("2"), 8191), "bitmap-beyond-end"),
    "data gone": (lambda f: f.data("2").unlink(), "data-missing"),
    "data cut": (lambda f: _cut(f.data("2"), SIZE - 1), "data-cut-off"),
    "frozen bitmap gone": (lambda f: f.bitmap("1").unlink(), "bitmap-damaged"),
    "frozen data cut": (lambda f: _cut(f.data("1"), 0), "data-cut-off"),
    "live bitmap's checksum": (lambda f: _flip(f.live("2"), 57), "live-bitmap-damaged"),
    "live bitmap cut": (lambda f: _cut(f.live("2"), 10), "live-bitmap-damaged"),
    "failed flush": (lambda f: _flip(f.live("2"), 64), "flush-failed"),
    "live bits lost": (lambda f: _flip(f.live("2"), 4096), "live-bitmap-behind"),
    "everything gone": (
        lambda f: f.directory.rename(f.directory.parent.parent / "aside"), "disk-missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OVERLAY_DAMAGE))
def test_damage_to_an_overlay_is_named_and_not_repaired(bench: Bench, name: str) -> None:
    """Each damage has its code, in the one disk that has it, and `repair` leaves it alone."""
    damage, code = OVERLAY_DAMAGE[name]
    bench.overlay(frozen=True)
    uuid = bench.overlay(frozen=True)
    damage(bench.files(uuid))
    faults, _ = codes(report := bench.check())
    assert code in faults
    assert {item.subject for item in report.faults} == {uuid}
    assert all(item.message.endswith(".") for item in report.faults)
    contents = bench.contents()
    assert code in codes(bench.check(uuid, repair=True))[0]
    assert bench.contents() == contents
    assert code in codes(bench.check(uuid))[0]


def test_damage_to_a_raw_disk_is_named(bench: Bench) -> None:
    """A raw disk's file must be there, and as long as the disk."""
    uuid = bench.raw()
    data = bench.directory(uuid) / "data"
    _cut(data, SIZE - 512)
    assert codes(bench.check(uuid)) == (["size-differs"], [])
    data.unlink()
    assert codes(bench.check(uuid)) == (["data-missing"], [])


def test_newer_format_is_told_apart_from_damage(bench: Bench) -> None:
    """A disk of a later version is no damage; the version to install is asked for."""
    uuid = bench.overlay()
    path = bench.directory(uuid) / "layout.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 9'))
    assert codes(bench.check()) == (["overlay-too-new"], [])


def test_rows_and_files_must_agree(bench: Bench) -> None:
    """Another form, size or base in the rows than in the files is a fault; a daemon that died in
    between changes the rows at its start, so that without one only a file too short is."""
    uuid = bench.overlay()
    update = "UPDATE disks SET form = ?, size_bytes = ?, base_manifest = ?"
    for form, size_bytes, base, code, always in (
        ("raw", SIZE, BASE, "form-differs", False),
        ("overlay", SIZE - 512, BASE, "size-differs", False),
        ("overlay", SIZE, None, "base-differs", False),
        ("overlay", SIZE + 512, BASE, "size-differs", True),
    ):
        bench.db.connection.execute(update, (form, size_bytes, base))
        assert codes(bench.check(uuid)) == ([code] if always else [], [])
        with RunDirectory(bench.configuration.run_dir).lock():
            assert codes(bench.check()) == ([code], [])


@pytest.mark.parametrize("frozen", [False, True])
def test_space_that_no_bit_refers_to_is_freed(bench: Bench, frozen: bool) -> None:
    """Blocks that were written but never became the disk's are a leak; the disk's stay."""
    uuid = bench.overlay(frozen=frozen)
    name = "1" if frozen else "2"
    data = bench.files(uuid).data(name)
    before = data.read_bytes()
    allocated = data.stat().st_blocks
    with data.open("r+b") as file:
        for block in (10, 11, 12, 700):
            file.seek(block * BLOCK)
            file.write(b"leaked".ljust(BLOCK, b"!"))
    report = bench.check()
    assert codes(report) == ([], ["space-unreferenced"])
    assert f" {4 * BLOCK} bytes " in report.leaks[0].message
    assert codes(bench.check(repair=True)) == ([], [])
    assert data.read_bytes() == before
    assert data.stat().st_blocks == allocated
    assert codes(bench.check()) == ([], [])


def test_live_bits_keep_their_blocks(bench: Bench) -> None:
    """After a process died the live bitmap counts: what only it has is not freed."""
    uuid = bench.overlay()
    files = bench.files(uuid)
    with files.data("2").open("r+b") as file:
        file.seek(9 * BLOCK)
        file.write(b"acknowledged".ljust(BLOCK, b"."))
    bench.set_bit(files.live("2"), 9)
    before = files.data("2").read_bytes()
    assert codes(bench.check(repair=True)) == ([], [])
    assert files.data("2").read_bytes() == before
    files.live("2").unlink()
    assert codes(bench.check(repair=True)) == ([], [])
    assert files.data("2").read_bytes() == before[: 9 * BLOCK] + bytes(BLOCK) + before[10 * BLOCK :]


def test_live_bitmap_of_another_boot_is_removed(bench: Bench) -> None:
    """After a reboot only the durable bitmap counts; the stale live one is a leak."""
    uuid = bench.overlay()
    live = bench.files(uuid).live("2")
    content = live.read_bytes()
    live.write_bytes(header(SIZE, bench.generation, b"another boot....") + content[4096:])
    assert codes(bench.check()) == ([], ["live-bitmap-stale"])
    assert [item.code for item in bench.check(repair=True).repaired] == ["live-bitmap-stale"]
    assert not live.exists()
    assert codes(bench.check()) == ([], [])


def test_what_a_crash_leaves_is_removed(bench: Bench) -> None:
    """Unnamed layers, a half-made disk and live bitmaps of nobody are leaks and go."""
    uuid = bench.overlay()
    unknown = str(uuid_module.uuid4())
    before = bench.contents()
    bench.layer(uuid, "1", (7,))
    (bench.directory(uuid) / ".layout.json.new").write_bytes(b"half")
    (bench.state_dir / "stage" / f"disk-{unknown}").mkdir()
    (bench.state_dir / "stage" / f"disk-{unknown}" / "data").write_bytes(b"half")
    (bench.state_dir / "stage" / "IMAGE").mkdir()
    (bench.live / f"{unknown}.1.bitmap").write_bytes(b"")
    faults, leaks = codes(bench.check())
    assert faults == []
    assert sorted(leaks) == sorted(
        [*["file-unreferenced"] * 3, *["live-bitmap-stale"] * 2, "stage-leftover"]
    )
    assert len(bench.check(repair=True).repaired) == 6
    assert bench.contents() == before
    assert os.listdir(bench.state_dir / "stage") == ["IMAGE"]


def test_unknown_disk_is_told_and_kept(bench: Bench) -> None:
    """A directory that no row names may be all that is left of a disk: it is never removed."""
    uuid = bench.raw()
    bench.db.connection.execute("DELETE FROM disks")
    (bench.state_dir / "disks" / "notes").mkdir()
    for repair in (False, True):
        report = bench.check(repair=repair)
        assert codes(report) == (["disk-unknown"] * 2, [])
        assert "copy it elsewhere" in report.faults[0].message + report.faults[1].message
    assert (bench.directory(uuid) / "data").exists()


def test_without_a_state_database_nothing_is_judged(bench: Bench) -> None:
    """When the rows are lost the disks are not called unknown."""
    bench.raw()
    bench.db.close()
    for path in bench.state_dir.glob("state.db*"):
        path.unlink()
    report = bench.check(repair=True)
    assert codes(report) == ([], [])
    assert len(report.notes) == 1
    assert len(os.listdir(bench.state_dir / "disks")) == 1


def test_base_must_be_there_and_whole(bench: Bench) -> None:
    """A missing or damaged manifest or chunk is named once, with the disks that need it."""
    uuids = [bench.overlay() for _ in range(5)]
    chunks = [path for path in (bench.state_dir / "chunks").glob("?/?/*") if path.is_file()]
    assert len(chunks) == 3
    content = chunks[0].read_bytes()
    chunks[0].chmod(0o600)
    chunks[0].write_bytes(b"x" + content[1:])
    assert codes(bench.check()) == ([], [])
    report = bench.check(deep=True)
    assert codes(report) == (["base-chunk-corrupt"], [])
    assert report.faults[0].subject == BASE
    assert f"disk {uuids[0]}" in report.faults[0].message
    assert "and 2 more" in report.faults[0].message
    chunks[0].unlink()
    assert codes(bench.check()) == (["base-chunk-missing"], [])
    manifest = bench.state_dir / "manifests" / f"{BASE}.caibx"
    _flip(manifest, 5)
    assert codes(bench.check()) == (["base-damaged"], [])
    manifest.unlink()
    assert codes(bench.check(uuids[3])) == (["base-missing"], [])


def test_snapshots_must_be_there(bench: Bench) -> None:
    """A snapshot's file or manifest must exist; a file that is no snapshot is told and kept."""
    raw, overlay = bench.raw(), bench.overlay()
    of_raw, of_overlay = snapshot(bench, raw, "file"), snapshot(bench, overlay, "manifest")
    assert sorted(codes(bench.check())[0]) == ["base-missing", "snapshot-missing"]
    manifests = bench.state_dir / "manifests"
    shutil.copyfile(manifests / f"{BASE}.caibx", manifests / f"{of_overlay}.caibx")
    folder = bench.directory(raw) / "snapshots"
    folder.mkdir()
    (folder / of_raw).write_bytes(b"short")
    (folder / "unknown").write_bytes(b"somebody's")
    assert codes(bench.check(repair=True)) == (["snapshot-size-differs", "snapshot-unknown"], [])
    assert (folder / "unknown").exists()


def test_running_daemon_is_left_alone(bench: Bench) -> None:
    """Beside a daemon nothing is repaired; an open disk's blocks are not judged, others' are."""
    opened, closed = bench.overlay(), bench.overlay()
    with RunDirectory(bench.configuration.run_dir).lock():
        with pytest.raises(Conflict) as caught:
            bench.check(repair=True)
        assert caught.value.code == "daemon-running"
        with bench.files(opened).bitmap("2").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            bench.set_bit(bench.files(opened).live("2"), 900)
            _flip(bench.files(closed).bitmap("2"), 8191)
            report = bench.check()
            bench.files(opened).data("2").rename(bench.directory(opened) / "aside")
            assert "data-missing" in codes(bench.check(opened))[0]
    assert codes(report) == (["bitmap-beyond-end", "live-bitmap-behind"], [])
    assert {item.subject for item in report.faults} == {closed}
    assert report.disks == 2
    assert any(opened in note and "open" in note for note in report.notes)


def test_disk_under_way_is_left_out(bench: Bench) -> None:
    """A disk that the daemon works on is not judged, and the report says so; a daemon that died is
    no excuse."""
    uuid = bench.overlay()
    (bench.directory(uuid) / "layout.json").unlink()
    bench.db.connection.execute(
        "INSERT INTO operations (id, kind, subject, state, request, owner, created_at, updated_at) "
        "VALUES ('1', 'hydrate', ?, 'running', '{}', 'root', 't', 't')",
        (uuid,),
    )
    with RunDirectory(bench.configuration.run_dir).lock():
        report = bench.check()
    assert (codes(report), report.disks) == (([], []), 0)
    assert any(uuid in note for note in report.notes)
    assert codes(bench.check()) == (["data-missing", "layout-missing"], [])


def test_many_blocks_are_compared_in_pieces(bench: Bench) -> None:
    """A disk whose bitmap has several pieces is checked to its end."""
    size = 200 * 1024 * MIB + 512
    uuid = bench.row("overlay", None, size)
    bench.directory(uuid).mkdir()
    files = bench.files(uuid)
    length = bitmap.file_bytes(size)
    blocks = (1, 32767, 32768, 262143, 40_000_000)
    content = bytearray(header(size, bench.generation).ljust(length, b"\0"))
    with files.data("1").open("wb") as file:
        file.truncate(size)
        for block in blocks:
            file.seek(block * BLOCK)
            file.write(b"x" * BLOCK)
            content[4096 + block // 8] |= 1 << block % 8
        for block in (32766, 262144):
            file.seek(block * BLOCK)
            file.write(b"leak".ljust(BLOCK, b"!"))
    files.bitmap("1").write_bytes(content)
    files.write_layout(Layout(size, "1", None, None, None))
    report = bench.check(repair=True)
    assert codes(report) == ([], [])
    assert [item.code for item in report.repaired] == ["space-unreferenced"]
    assert f" {2 * BLOCK} bytes " in report.repaired[0].message
    with files.data("1").open("rb") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            assert file.read(BLOCK) == b"x" * BLOCK


@pytest.mark.root
@pytest.mark.slow
def test_command_beside_a_daemon_and_without(tmp_path: Path) -> None:
    """`disk check` on an appliance: clean while it runs, after kill -9, and 6 once a bitmap is hurt."""
    published = publish_image(tmp_path / "published", 3 * MIB)
    with tempfile.TemporaryDirectory(prefix="sc-check-") as root:
        appliance = Appliance(
            Path(root), endpoint=published.endpoint, fingerprint=published.fingerprint
        )
        with appliance:
            clone = appliance.json("disk", "create", "--reference", published.identifier)
            appliance.json("disk", "create", "--size", "4M")
            with (appliance.run_dir / "blocks" / "disks" / clone["uuid"]).open("r+b") as disk:
                disk.write(b"written" * 1000)
                disk.flush()
                os.fsync(disk.fileno())
                appliance.json("disk", "snapshot", clone["uuid"])
                disk.seek(2 * MIB)
                disk.write(b"not flushed")
            found = appliance.json("disk", "check", "--deep")
            assert (found["disks"], found["faults"], found["leaks"]) == (2, [], [])
            assert any("is open" in note for note in found["notes"])
            refused = appliance.run("disk", "check", "--repair")
            assert refused.returncode == 4
            assert "[daemon-running]" in refused.stderr
            appliance.kill()
            found = appliance.json("disk", "check", "--deep")
            assert (found["disks"], found["faults"]) == (2, [])
            found = appliance.json("disk", "check", "--repair")
            assert (found["faults"], found["leaks"]) == ([], [])
            appliance.start()
            with (appliance.run_dir / "blocks" / "disks" / clone["uuid"]).open("rb") as disk:
                assert disk.read(7000) == b"written" * 1000
                disk.seek(2 * MIB)
                assert disk.read(11) == b"not flushed"
        (durable,) = (appliance.state_dir / "disks" / clone["uuid"]).glob("*bitmap")
        _flip(durable, 3)
        damaged = appliance.run("disk", "check")
        assert damaged.returncode == 6
        assert "fault: bitmap-damaged: " in damaged.stdout
        assert "2 disks checked: 1 faults, 0 leaks, 0 repaired." in damaged.stdout
        assert appliance.run("disk", "check", str(uuid_module.uuid4())).returncode == 3
