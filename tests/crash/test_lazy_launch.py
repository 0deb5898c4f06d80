"""Launches before the download ends, on a whole appliance: right bytes, one request for each chunk,
and `kill -9` of everything in the middle.

`make test` kills 2 times; `make crash` as often as LAZY_KILLS says.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.nginx import Nginx
from support.publishing import Published, publish_file, publish_image, random_image

from stratocache.cache.chunks import CHUNK_BYTES

MIB = 1024**2
IMAGE_BYTES = 32 * MIB
SMALL_BYTES = 8 * MIB
KINDS = ["unproven", "stream"] if "LAZY_KILLS" in os.environ else ["unproven"]
KILLS = int(os.environ.get("LAZY_KILLS", "2"))
KILLS_PER_IMAGE = 5
LIVES = -(-KILLS // KILLS_PER_IMAGE)
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
GUESTS = 16
DEAD_READS = 300
DEMAND_TIMEOUT_S = 25
TIMEOUT_S = 90

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300 + 60 * KILLS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the origin serves."""
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


@pytest.fixture
def nginx(tmp_path: Path, folder: Path) -> Iterator[Nginx]:
    """A real web server, as slow as a distant one."""
    with Nginx(tmp_path / "nginx", folder, limit_rate="4m") as server:
        yield server


@pytest.fixture
def published(folder: Path, nginx: Nginx) -> Published:
    """An image with an endorsed index, at a raw location."""
    return publish_image(
        folder, IMAGE_BYTES, locations=[f"{nginx.url}/image-1"], index_url=nginx.url
    )


@pytest.fixture
def small(folder: Path, nginx: Nginx) -> Published:
    """The same, but soon complete."""
    return publish_image(
        folder, SMALL_BYTES, locations=[f"{nginx.url}/image-1"], index_url=nginx.url
    )


def _appliance(
    tmp_path: Path, published: Published, *, quiet_s: float = 1, provisional: bool = False
) -> Appliance:
    appliance = Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra=f"fetch.quiet_s = {quiet_s}",
    )  # fmt: skip
    if provisional:
        appliance.environment["STRATOCACHE_CATALOGUES__STRATUSLAB__PROVISIONAL"] = "allow"
    return appliance


def _launch(
    appliance: Appliance, published: Published, instance: str, *, provisional: bool = False
) -> Path:
    """Launch; return the file of the clone."""
    body = {
        "reference": published.identifier, "instance": instance, "provisional": provisional,
    }  # fmt: skip
    status, launch = appliance.request("POST", "/v1/launches?wait=60", body)
    assert status == 201, launch
    return appliance.run_dir / "blocks" / "disks" / str(launch["boot"]["disk_uuid"])


def _image(appliance: Appliance, published: Published) -> dict[str, object]:
    status, image = appliance.request("GET", f"/v1/images/{published.identifier}")
    assert status == 200, image
    found: dict[str, object] = image
    return found


def _wait_verified(appliance: Appliance, published: Published) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while _image(appliance, published)["state"] != "verified":
        assert time.monotonic() < deadline, appliance.log.read_text()[-4000:]
        time.sleep(0.1)


def _read(file: Path, content: bytes, seed: int) -> int:
    """Read a whole disk in a random order; return how many pieces were not as they should be."""
    wrong = 0
    offsets = list(range(0, len(content), 256 * 1024))
    random.Random(seed).shuffle(offsets)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset in offsets:
            piece = os.pread(descriptor, 256 * 1024, offset)
            wrong += piece != content[offset : offset + 256 * 1024]
    finally:
        os.close(descriptor)
    return wrong


def test_sixteen_guests_of_one_uncached_image_cost_it_once(
    tmp_path: Path, published: Published, nginx: Nginx
) -> None:
    """Sixteen disks are read while their image comes: all right, each chunk asked for once."""
    content = published.image.read_bytes()
    with _appliance(tmp_path, published) as appliance:
        with ThreadPoolExecutor(GUESTS) as pool:
            files = list(
                pool.map(lambda number: _launch(appliance, published, f"vm{number}"), range(GUESTS))
            )
            assert _image(appliance, published)["state"] == "provisional"
            assert sum(pool.map(_read, files, [content] * GUESTS, range(GUESTS))) == 0
        _wait_verified(appliance, published)
        shown = appliance.json("image", "show", published.identifier)
        disk = appliance.json("disk", "show", files[0].name)

    asked: Counter[int] = Counter()
    for request in nginx.requests():
        if request.path == "/image-1" and request.status == 206:
            asked.update(range(request.start // CHUNK_BYTES, -(-request.end // CHUNK_BYTES)))
    stored = nginx.chunk_requests()
    assert set(asked.values()) <= {1} and set(stored.values()) <= {1}
    zero = sum(
        not any(content[start : start + CHUNK_BYTES])
        for start in range(0, IMAGE_BYTES, CHUNK_BYTES)
    )
    assert len(asked) + len(stored) == IMAGE_BYTES // CHUNK_BYTES - zero
    assert shown["remote_wait_s"] > 0 and shown["remote_bytes"] > 0
    assert len(shown["disks"]) == GUESTS and shown["complete_in_s"] == 0
    assert disk["fenced"] is False and disk["remote_wait_s"] > 0


def test_readers_do_not_notice_a_killed_blockd(tmp_path: Path, published: Published) -> None:
    """While guests read what is not here, kill -9 of blockd costs them time: no error, no byte."""
    content = published.image.read_bytes()
    with _appliance(tmp_path, published) as appliance:
        file = _launch(appliance, published, "vm")
        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(_read, file, content, seed) for seed in range(4)]
            for _ in range(KILLS):
                time.sleep(random.Random(SEED).uniform(0.3, 1.5))
                for pid in appliance.pids("stratocache.fs.blockd"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            assert [reader.result(TIMEOUT_S) for reader in readers] == [0] * 4
        _wait_verified(appliance, published)


def test_kills_in_the_middle_cost_no_byte(tmp_path: Path, published: Published) -> None:
    """After kill -9 of everything the launch stands, the image goes on where it was, and all that
    the disk reads and has written is right."""
    _kill_in_the_middle(tmp_path, published, provisional=False)


@pytest.mark.parametrize("kind", KINDS)
def test_kills_in_the_middle_of_a_stream_cost_no_byte(
    tmp_path: Path, folder: Path, nginx: Nginx, kind: str
) -> None:
    """The same of images that only flow: with an index but no store, and without an index, where
    a chunk is never another one after a kill than it was before."""
    index_url = nginx.url if kind == "stream" else None
    published = publish_image(
        folder, IMAGE_BYTES, compression="gz", locations=[f"{nginx.url}/image-1.gz"],
        index_url=index_url,
    )  # fmt: skip
    shutil.rmtree(folder / "image-1.castr", ignore_errors=True)
    _kill_in_the_middle(tmp_path, published, provisional=kind == "unproven")
    moved = sum(asked.sent_bytes for asked in nginx.requests() if asked.path == "/image-1.gz")
    assert moved < LIVES * published.source.stat().st_size + (KILLS + 1) * MIB


def _kill_in_the_middle(tmp_path: Path, published: Published, *, provisional: bool) -> None:
    """Kill everything KILLS times while an image comes, which is fetched anew every few of them."""
    print(f"CRASH_SEED={SEED} LAZY_KILLS={KILLS}")
    chance = random.Random(SEED)
    appliance = _appliance(tmp_path, published, provisional=provisional)
    amid = 0
    with appliance:
        for life in range(LIVES):
            if life:
                assert appliance.request("DELETE", "/v1/launches/vm")[0] == 204
                path = f"/v1/images/{published.identifier}"
                assert appliance.request("DELETE", path)[0] == 204
            kills = min(KILLS_PER_IMAGE, KILLS - life * KILLS_PER_IMAGE)
            file = _launch(appliance, published, "vm", provisional=provisional)
            content = bytearray(published.image.read_bytes())
            for number in range(kills):
                amid += _kill_once(appliance, published, file, content, chance, number / kills)
            assert _read(file, bytes(content), SEED) == 0
            _wait_verified(appliance, published)
            image = appliance.run_dir / "blocks" / "images" / published.identifier
            assert image.read_bytes() == published.image.read_bytes()
            assert appliance.run("disk", "check").returncode == 0
            assert os.listdir(appliance.state_dir / "stage") == []
    print(f"{KILLS} kills, {amid} of them before the image was here, in {LIVES} fetches")
    assert amid > 0


def _kill_once(
    appliance: Appliance, published: Published, file: Path, content: bytearray,
    chance: random.Random, part: float,
) -> bool:  # fmt: skip
    """Write to a disk, kill everything, and read what is not beyond a part of the image.

    Tells whether the image was still on its way.
    """
    offset = chance.randrange(0, IMAGE_BYTES - 5000)
    written = chance.randbytes(5000)
    descriptor = os.open(file, os.O_RDWR)
    os.pwrite(descriptor, written, offset)
    os.fsync(descriptor)
    os.close(descriptor)
    content[offset : offset + 5000] = written
    time.sleep(chance.uniform(0, 1.0))
    amid = _image(appliance, published)["state"] == "provisional"
    appliance.kill()
    appliance.start()
    at = chance.randrange(0, 1 + int(part * (IMAGE_BYTES - MIB)))
    descriptor = os.open(file, os.O_RDONLY)
    assert os.pread(descriptor, MIB, at) == content[at : at + MIB]
    os.close(descriptor)
    return amid


def test_a_dead_origin_leaves_other_disks_alone(
    tmp_path: Path, small: Published, nginx: Nginx
) -> None:
    """While hundreds of reads wait for an origin that says nothing, disks and images that are here
    are read as ever; when it speaks again those reads are right."""
    healthy = publish_image(tmp_path / "published", SMALL_BYTES, seed=2)
    content, other = small.image.read_bytes(), healthy.image.read_bytes()
    with ExitStack() as stack:
        appliance = stack.enter_context(_appliance(tmp_path, small))
        appliance.json("image", "fetch", healthy.identifier)
        clone = _launch(appliance, healthy, "healthy")
        waiting = _launch(appliance, small, "waiting")
        image = waiting.parent.parent / "images" / small.identifier
        stack.enter_context(nginx.silent())
        pool = stack.enter_context(ThreadPoolExecutor(DEAD_READS + 1))
        readers = [
            pool.submit(_read_piece, file, content, number * 4096 * 17 % SMALL_BYTES)
            for file in (waiting, image)
            for number in range(DEAD_READS // 2)
        ]
        time.sleep(1)  # they are in the kernel by now; a healthy read that is too early proves less
        started = time.monotonic()
        assert pool.submit(_read, clone, other, SEED).result(DEMAND_TIMEOUT_S / 2) == 0
        served = clone.parent.parent / "images" / healthy.identifier
        assert served.read_bytes() == other
        print(f"read in {time.monotonic() - started:.2f} s beside {DEAD_READS} reads that wait")
        assert sum(not reader.done() for reader in readers) > DEAD_READS // 2
        nginx.speak()
        assert [reader.result(TIMEOUT_S) for reader in readers] == [True] * len(readers)


def _read_piece(file: Path, content: bytes, offset: int) -> bool:
    """Read one block; tell whether it is right."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.pread(descriptor, 4096, offset) == content[offset : offset + 4096]
    finally:
        os.close(descriptor)


def test_a_snapshot_is_downloaded_before_its_image_is_here(
    tmp_path: Path, small: Published
) -> None:
    """A download reads a snapshot's chunks that are still to come, and those that are damaged, as a
    guest does: they come, or are repaired, while it waits."""
    content = bytearray(small.image.read_bytes())
    with _appliance(tmp_path, small, quiet_s=600) as appliance:
        disk = _launch(appliance, small, "vm").name
        content[5000:5500] = bytes(500)
        descriptor = os.open(appliance.run_dir / "blocks" / "disks" / disk, os.O_RDWR)
        os.pwrite(descriptor, bytes(500), 5000)
        os.close(descriptor)
        snapshot = appliance.json("disk", "snapshot", disk)["id"]
        _wait_available(appliance, disk, snapshot)
        for number in range(2):
            target = tmp_path / f"download-{number}"
            done = appliance.run("disk", "download", disk, str(target), "--snapshot", snapshot)
            assert done.returncode == 0, done.stderr
            assert target.read_bytes() == content
            assert _image(appliance, small)["state"] == "provisional"
            chunks = [
                path
                for path in (appliance.state_dir / "chunks").rglob("*")
                if len(path.name) == 64
                and path.name != hashlib.sha256(content[:CHUNK_BYTES]).hexdigest()
            ]
            for path in chunks[:20]:
                os.truncate(path, 1000)


def _wait_available(appliance: Appliance, disk: str, snapshot: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        _, listed = appliance.request("GET", f"/v1/disks/{disk}/snapshots")
        [state] = [one["state"] for one in listed["snapshots"] if one["id"] == snapshot]
        if state == "available":
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


def test_nobody_reads_a_rejected_image(tmp_path: Path, folder: Path, nginx: Nginx) -> None:
    """Pages of an image that the kernel has kept, and files that are open, end with the proof that
    the image is not what was promised; in a new process too."""
    served, promised = folder / "image-1", folder / "promised"
    random_image(served, 8 * MIB)
    random_image(promised, 8 * MIB, seed=2)
    published = publish_file(
        folder, promised, locations=[f"{nginx.url}/image-1"], index_url=nginx.url, indexed=served
    )
    content = served.read_bytes()
    with _appliance(tmp_path, published) as appliance:
        _launch(appliance, published, "vm")
        image = appliance.run_dir / "blocks" / "images" / published.identifier
        with image.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), MIB, 0) == content[:MIB]
            deadline = time.monotonic() + TIMEOUT_S
            while _image(appliance, published)["state"] != "rejected":
                assert time.monotonic() < deadline, appliance.log.read_text()[-4000:]
                time.sleep(0.05)
            _wait_unreadable(file.fileno())
            for pid in appliance.pids("stratocache.fs.blockd"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _wait_unreadable(file.fileno())
        assert not image.exists()


def _wait_unreadable(descriptor: int) -> None:
    """Return as soon as no page of an image's beginning can be read."""
    deadline = time.monotonic() + TIMEOUT_S
    for offset in range(0, MIB, 4096):
        with contextlib.suppress(OSError):
            while os.pread(descriptor, 4096, offset):
                assert time.monotonic() < deadline, "a rejected image is still read"
                time.sleep(0.05)
