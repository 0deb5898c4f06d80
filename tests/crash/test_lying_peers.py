"""Peers that lie, corrupt, cut, dawdle and refuse while guests read through FUSE: no wrong byte
reaches a reader.

`make test` meets 40 such answers, `make crash` CRASH_FAULTS. The seed is printed; give it back as
CRASH_SEED to draw the same faults again.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.appliance import Appliance
from support.lazy import manifest_of
from support.lying_peer import FALSE_MANIFEST, LIES, LyingPeer
from support.nginx import Nginx
from support.peer_hosts import HOST, Site
from support.publishing import Published, publish_image, random_image
from support.reading import Reader

FAULTS = int(os.environ.get("CRASH_FAULTS", "40"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
MIB = 1024**2
LAZY_BYTES = 12 * MIB
PACKED_BYTES = 3 * MIB
PEERS = 4
FAULT_RATE = 0.7
PEER_TIMEOUT_S = 1.0
TIMEOUT_S = 90
FETCH_EVERY = 2
READERS = 2

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(180 + 4 * FAULTS)]


@dataclass
class World:
    """An appliance, its peers, and an origin that is as it should be."""

    appliance: Appliance
    peers: list[LyingPeer]
    lazy: Published
    """An image whose chunks an endorsed index names."""
    packed: Published
    """One of which nothing is proven before the whole is here: peers' manifests are tried."""

    def faults(self) -> int:
        """Return how many answers were not right."""
        return sum(peer.faults for peer in self.peers)

    def chunk_paths(self) -> list[Path]:
        """Return where the chunks of the lazy image are, or were."""
        names = [digest.hex() for digest in manifest_of(self.lazy.image.read_bytes()).stored()]
        chunks = self.appliance.state_dir / "chunks"
        return [chunks / name[0] / name[1] / name for name in names]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Four peers that have both images, and of the second a false one too."""
    print(f"CRASH_SEED={SEED} CRASH_FAULTS={FAULTS}")
    folder = tmp_path / "published"
    folder.mkdir()
    random_image(folder / "false", PACKED_BYTES, seed=3)
    with ExitStack() as stack:
        nginx = stack.enter_context(Nginx(tmp_path / "nginx", folder))
        lazy = publish_image(
            folder, LAZY_BYTES, locations=[f"{nginx.url}/image-1"], index_url=nginx.url
        )
        packed = publish_image(
            folder, PACKED_BYTES, compression="gz", seed=2, locations=[f"{nginx.url}/image-2.gz"]
        )
        site = Site(tmp_path / "site")
        peers = []
        for number in range(PEERS):
            peer = LyingPeer(
                site, SEED + number, fault_rate=FAULT_RATE, late_s=1.5 * PEER_TIMEOUT_S
            )
            peer.share(lazy.identifier, lazy.image.read_bytes(), tmp_path)
            peer.share(
                packed.identifier, packed.image.read_bytes(), tmp_path,
                false=(folder / "false").read_bytes(),
            )  # fmt: skip
            peers.append(stack.enter_context(peer))
        place = site.folder / HOST
        names = ", ".join(f'"{peer.name}"' for peer in peers)
        appliance = Appliance(
            tmp_path / "appliance", endpoint=lazy.endpoint, fingerprint=lazy.fingerprint,
            extra=(
                "fetch.quiet_s = 0.1\n"
                f"[peers]\nhosts = [{names}]\ntimeout_s = {PEER_TIMEOUT_S}\n"
                f'token_file = "{place}/token"\nca_file = "{place}/ca.pem"\n'
                f'certificate_file = "{place}/host.pem"\nkey_file = "{place}/host.key"\n'
            ),
        )  # fmt: skip
        yield World(stack.enter_context(appliance), peers, lazy, packed)


def test_no_wrong_byte_comes_from_a_peer(world: World) -> None:
    """Chunks that guests wait for, and images that are fetched, come from peers of which most lie:
    every read is right, none fails, and what is kept is what was signed."""
    appliance, content = world.appliance, world.lazy.image.read_bytes()
    appliance.json("image", "fetch", world.lazy.identifier)
    uuid = appliance.json("disk", "create", "--reference", world.lazy.identifier)["uuid"]
    blocks = appliance.run_dir / "blocks"
    paths = [blocks / "images" / world.lazy.identifier, blocks / "disks" / uuid]
    readers = [Reader(paths[number % 2], content, SEED + number) for number in range(READERS)]
    for reader in readers:
        reader.start()
    lives = 0
    try:
        while world.faults() < FAULTS:
            _lose_all(world)
            if lives % FETCH_EVERY == 0:
                _fetch_again(world)
            _wait_until_whole(world)
            lives += 1
            assert all(reader.is_alive() for reader in readers)
    finally:
        for reader in readers:
            reader.finish()
    counts: Counter[str] = sum((peer.counts for peer in world.peers), Counter())
    pieces = sum(reader.pieces for reader in readers)
    wrong = sum(len(reader.wrong) for reader in readers)
    print(f"{world.faults()} faults {dict(counts)}; {pieces} pieces read, {wrong} wrong")
    assert wrong == 0
    for reader in readers:
        assert reader.failures == [], appliance.log.read_text()[-6000:]
        assert reader.pieces > 0
    assert sum(counts[name] for name in LIES) > 0 and counts[FALSE_MANIFEST] > 0
    _assert_whole(world, paths)


def _lose_all(world: World) -> None:
    """Take all chunks of the image away, and let a `blockd` begin that blames no peer yet."""
    for path in world.chunk_paths():
        path.unlink(missing_ok=True)
    for pid in world.appliance.pids("stratocache.fs.blockd"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fetch_again(world: World) -> None:
    """Fetch the image that a peer's manifest may be used for; it is right whatever the peer said."""
    path = f"/v1/images/{world.packed.identifier}"
    status, answer = world.appliance.request("DELETE", path)
    assert status in (204, 404), answer
    world.appliance.json("image", "fetch", world.packed.identifier)
    served = world.appliance.run_dir / "blocks" / "images" / world.packed.identifier
    assert served.read_bytes() == world.packed.image.read_bytes()


def _wait_until_whole(world: World) -> None:
    """Return when the readers have brought every chunk back."""
    deadline = time.monotonic() + TIMEOUT_S
    paths = world.chunk_paths()
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, world.appliance.log.read_text()[-6000:]
        time.sleep(0.05)


def _assert_whole(world: World, paths: list[Path]) -> None:
    """Nothing that a peer said is left where it could be served."""
    appliance, content = world.appliance, world.lazy.image.read_bytes()
    for path in paths:
        assert path.read_bytes() == content
    assert appliance.json("cache", "status")["losses"] == []
    assert appliance.json("cache", "check", "--deep")["faults"] == []
