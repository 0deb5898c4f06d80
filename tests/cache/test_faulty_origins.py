"""Random faults of origins while images are fetched whole and on demand: all is right, or an error
that says why; the good location is used when there is one.

`make crash` plays ORIGIN_SEQUENCES of each kind. The seed is printed; give it back as CRASH_SEED.
"""

import gzip
import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.lazy import LazyHost, entry_of, index_of, manifest_of, some_image
from support.nginx import Nginx
from support.throttle import Throttle

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.completion import Completion
from stratocache.cache.configuration import Configuration, FetchSettings, SpaceSettings
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.endorsed_index import read_index
from stratocache.cache.entry import EndorsedIndex, Entry
from stratocache.cache.errors import StratocacheError
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff

SEQUENCES = int(os.environ.get("ORIGIN_SEQUENCES", "3"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
LINK_BYTES_PER_S = 12_500_000
IMAGE = some_image(7, tail_bytes=70_001, zero=(3,))
BACKOFF = Backoff(base_s=0.01, limit_s=0.05)
READERS = 4

WHOLE_CODES = {
    "origin-failed", "location-not-found", "location-refused", "size-mismatch", "digest-mismatch",
    "source-truncated", "source-corrupt", "decompression-bomb",
}  # fmt: skip
INDEX_CODES = {"origin-failed", "location-not-found", "location-refused", "index-mismatch"}
DEMAND_CODES = {"chunk-unreachable"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * SEQUENCES)]


@dataclass
class Origins:
    """Three ways to the same files, all of them 100 Mbit/s wide."""

    folder: Path
    good: str
    without_ranges: str
    bad: str
    proxy: FaultyProxy


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origins]:
    """Two real web servers and a proxy that misbehaves."""
    root = tmp_path_factory.mktemp("origins")
    folder = root / "files"
    folder.mkdir()
    (folder / "image").write_bytes(IMAGE)
    (folder / "image.gz").write_bytes(gzip.compress(IMAGE, 1))
    (folder / "image.caibx").write_bytes(index_of(IMAGE, folder))
    with ExitStack() as stack:
        nginx = stack.enter_context(Nginx(root / "nginx", folder))
        plain = stack.enter_context(Nginx(root / "plain", folder, ranges=False))
        proxy = stack.enter_context(faulty_proxy(nginx.port))
        links = [
            stack.enter_context(Throttle(port, LINK_BYTES_PER_S))
            for port in (nginx.port, plain.port, proxy.port)
        ]
        yield Origins(folder, links[0].url, links[1].url, links[2].url, proxy)


def _settings() -> FetchSettings:
    return FetchSettings(attempts=3, read_timeout_s=1, connect_timeout_s=1)


def _chunks_right(state_dir: Path) -> int:
    """Compare every stored chunk with its name and the image's chunks; return how many there are."""
    known = {manifest_of(IMAGE).digest(index) for index in range(manifest_of(IMAGE).chunk_count)}
    found = [path for path in (state_dir / "chunks").rglob("*") if len(path.name) == 64]
    for path in found:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert bytes.fromhex(path.name) in known
    return len(found)


def _sequences(proxy: FaultyProxy, kind: str) -> Iterator[random.Random]:
    """Set up one sequence of faults after another; in the end print what was met."""
    before = Counter(proxy.counts)
    for number in range(SEQUENCES):
        seed = f"{SEED} {kind} {number}"
        chance = random.Random(seed)
        proxy.misbehave(chance.randrange(2**32), chance.choice((0.3, 0.6, 0.9, 1.0)))
        yield chance
    counts = proxy.counts - before
    print(f"CRASH_SEED={SEED} {kind}: {SEQUENCES} sequences, {dict(sorted(counts.items()))}")


def _judge_error(error: StratocacheError, codes: set[str]) -> str:
    """An error has a code that people may rely on, and says in a sentence what is wrong."""
    assert error.code in codes, f"{error.code}: {error.message}"
    assert len(error.message) > 20 and error.message.endswith((".", ")."))
    return error.code


def test_whole_images_come_right_or_not_at_all(origins: Origins, tmp_path: Path) -> None:
    """However an origin misbehaves, a fetch of the whole ends with the image or with an error that
    leaves nothing, and with the image when another location has it."""
    ended: Counter[str] = Counter()
    for number, chance in enumerate(_sequences(origins.proxy, "whole")):
        packed = chance.random() < 0.4
        name = "image.gz" if packed else "image"
        bases = [origins.bad]
        bases += chance.choice(([], [origins.good], [origins.without_ranges], [origins.bad + "/."]))
        chance.shuffle(bases)
        entry = entry_of(
            IMAGE, *(f"{base}/{name}" for base in bases), compression="gz" if packed else "none"
        )
        code = _fetch_whole(tmp_path / f"whole-{number}", entry)
        assert code == "done" or not {origins.good, origins.without_ranges} & set(bases), code
        ended[code] += 1
    print(f"ended {dict(ended)}")


def _fetch_whole(state_dir: Path, entry: Entry) -> str:
    configuration = Configuration(
        state_dir=state_dir, fetch=_settings(), space=SpaceSettings(reserve_bytes=0)
    )
    state_dir.mkdir()
    chunks = ChunkStore(state_dir / "chunks")
    images = ImageStore(state_dir, chunks)

    async def fetch() -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            fetcher = Fetcher(configuration, images, chunks, client, backoff=BACKOFF)
            try:
                found = await fetcher.fetch(entry, lambda done, total: None)
            except StratocacheError as error:
                assert all(location in error.message for location in entry.locations)
                return _judge_error(error, WHOLE_CODES)
        assert found.sha256 == hashlib.sha256(IMAGE).hexdigest()
        reader = await images.open_reader(entry.identifier)
        assert await reader.read(0, len(IMAGE)) == IMAGE
        return "done"

    try:
        code = trio.run(fetch)
    finally:
        chunks.close()
    stored = _chunks_right(state_dir)
    if code != "done":
        assert stored == 0 and images.identifiers() == []
    assert os.listdir(state_dir / "stage") == []
    return code


def test_chunks_on_demand_come_right_or_not_at_all(origins: Origins, tmp_path: Path) -> None:
    """However an origin misbehaves, a read gives the image's bytes or an error, nothing wrong is
    stored, and every read and the completion end well when a good origin is among the locations."""
    ended: Counter[str] = Counter()
    for number, chance in enumerate(_sequences(origins.proxy, "on demand")):
        bases = [origins.bad]
        bases += chance.choice(([], [origins.good], [origins.without_ranges]))
        chance.shuffle(bases)
        entry = entry_of(IMAGE, *(f"{base}/image" for base in bases))
        # patient where there is a good origin, so that a slow machine does not decide
        timeout_s = 20 if origins.good in bases else 2
        codes = _read_all(tmp_path / f"demand-{number}", entry, chance, timeout_s)
        assert set(codes) == {"right"} or origins.good not in bases, codes
        ended += codes
    print(f"reads ended {dict(ended)}")


def _read_all(
    state_dir: Path, entry: Entry, chance: random.Random, timeout_s: float
) -> Counter[str]:
    """Read an image by several readers at random, then complete it; return how reads ended."""
    state_dir.mkdir()
    ended: Counter[str] = Counter()
    host = LazyHost(state_dir, demand_timeout_s=timeout_s)
    host.configuration = host.configuration.model_copy(update={"fetch": _demand_settings(host)})
    identifier = host.add(IMAGE, entry)
    places = [chance.randrange(len(IMAGE)) for _ in range(4 * READERS)]

    async def read(places: Sequence[int]) -> None:
        reader = await host.images.open_reader(identifier)
        for offset in places:
            try:
                data = await reader.read(offset, 200_000)
            except StratocacheError as error:
                ended[_judge_error(error, DEMAND_CODES)] += 1
            else:
                assert data == IMAGE[offset : offset + 200_000]
                ended["right"] += 1

    async def script(fetcher: ChunkFetcher) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(READERS):
                nursery.start_soon(read, places[number::READERS])
        if ended.keys() <= {"right"}:
            completion = Completion(fetcher, host.images, attempts=20, backoff=BACKOFF)
            try:
                found = await completion.complete(entry, [], lambda done, total: None)
                assert found.sha256 == hashlib.sha256(IMAGE).hexdigest()
            except StratocacheError as error:
                ended[_judge_error(error, {"origin-failed"})] += 1

    try:
        host.run(script)
    finally:
        host.close()
    _chunks_right(state_dir)
    return ended


def _demand_settings(host: LazyHost) -> FetchSettings:
    return host.configuration.fetch.model_copy(update={"read_timeout_s": 1, "connect_timeout_s": 1})


def test_an_index_is_the_endorsed_one_or_not_used(origins: Origins) -> None:
    """However an origin misbehaves, the index it serves is the one that was signed, or an error."""
    entry = entry_of(
        IMAGE, f"{origins.good}/image",
        index=EndorsedIndex(
            url=f"{origins.bad}/image.caibx",
            sha256=hashlib.sha256((origins.folder / "image.caibx").read_bytes()).hexdigest(),
        ),
    )  # fmt: skip
    ended: Counter[str] = Counter()

    async def fetch() -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                found = await read_index(entry, client, _settings())
            except StratocacheError as error:
                return _judge_error(error, INDEX_CODES)
        assert found == manifest_of(IMAGE)
        return "done"

    for _ in _sequences(origins.proxy, "index"):
        ended[trio.run(fetch)] += 1
    print(f"ended {dict(ended)}")
