"""Two whole appliances: what one has, the other gets from it, over TLS, and the origin is spared."""

import http.client
import json
import os
import signal
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance, free_port
from support.nginx import Nginx
from support.peer_hosts import HOST, Site
from support.publishing import Published, publish_image

from stratocache.cache.manifest import Manifest

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(240)]

MIB = 1024**2
TIMEOUT_S = 60


class World:
    """An origin, two catalogued images and two appliances that know each other."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        folder = root / "published"
        self.origin = stack.enter_context(Nginx(root / "nginx", folder))
        self.packed = publish_image(
            folder, 8 * MIB + 4096, compression="gz", seed=1,
            locations=[f"{self.origin.url}/image-1.gz"],
        )  # fmt: skip
        self.lazy = publish_image(
            folder / "lazy", 16 * MIB, seed=2, locations=[f"{self.origin.url}/lazy/image-2"],
            index_url=f"{self.origin.url}/lazy",
        )  # fmt: skip
        self.site = Site(root / "site")
        self.port = free_port()
        self.first = stack.enter_context(self._appliance(root / "first", f'listen = "{HOST}"'))
        self.second = stack.enter_context(self._appliance(root / "second", ""))

    def _appliance(self, root: Path, listen: str) -> Appliance:
        place = self.site.folder / HOST
        return Appliance(
            root, endpoint=self.packed.endpoint, fingerprint=self.packed.fingerprint,
            extra=(
                'log_level = "debug"\nfetch.quiet_s = 0.1\napi.workers = 1\n'
                f'[peers]\nhosts = ["{HOST}"]\nport = {self.port}\n{listen}\n'
                f'token_file = "{place}/token"\nca_file = "{place}/ca.pem"\n'
                f'certificate_file = "{place}/host.pem"\nkey_file = "{place}/host.key"\n'
                f'[catalogues.lazy]\nendpoint = "{self.lazy.endpoint}"\n'
                f'trusted_fingerprints = ["{self.lazy.fingerprint}"]\n'
            ),
        )  # fmt: skip

    def origin_requests(self) -> list[tuple[str, int]]:
        """Return what the origin was asked for, and how much it sent."""
        return [(asked.path, asked.sent_bytes) for asked in self.origin.requests()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world of both tests."""
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("world"), stack)


def _wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _ask(appliance: Appliance, method: str, path: str, body: Any = None) -> Any:
    status, answer = appliance.request(method, path, body)
    assert status in (200, 201, 204), answer
    return answer


def _fetch(appliance: Appliance, published: Published, catalogue: str = "stratuslab") -> Any:
    wanted = {"reference": f"{catalogue}:{published.identifier}"}
    _ask(appliance, "POST", "/v1/images?wait=60", wanted)
    return _ask(appliance, "GET", f"/v1/images/{published.identifier}")


def _image_of(appliance: Appliance, published: Published) -> bytes:
    return (appliance.run_dir / "blocks" / "images" / published.identifier).read_bytes()


def _events(appliance: Appliance, kind: str) -> list[str]:
    with sqlite3.connect(appliance.state_dir / "state.db") as db:
        rows = db.execute("SELECT message FROM events WHERE kind = ?", (kind,)).fetchall()
    db.close()
    return [row[0] for row in rows]


def _damage_a_chunk(appliance: Appliance, published: Published) -> None:
    path = appliance.state_dir / "manifests" / f"{published.identifier}.caibx"
    manifest = Manifest.read(path, image_bytes_max=2**40)
    name = next(manifest.stored()).hex()
    chunk = appliance.state_dir / "chunks" / name[0] / name[1] / name
    chunk.write_bytes(b"rot" + chunk.read_bytes()[3:])


def test_one_host_has_it_from_the_other(world: World) -> None:
    """A second host gets a compressed image, an image with an index, and what has rotted of them,
    from the first: the bytes are right, the origin sends none of them, and both say what moved.
    The token is in no log, process or readable file."""
    first, second = world.first, world.second
    _fetch(first, world.packed)
    _fetch(first, world.lazy, "lazy")
    before = len(world.origin_requests())

    assert _fetch(second, world.packed)["state"] == "verified"
    assert _fetch(second, world.lazy, "lazy")["state"] == "verified"
    assert _image_of(second, world.packed) == world.packed.image.read_bytes()
    assert _image_of(second, world.lazy) == world.lazy.image.read_bytes()
    for published in (world.lazy, world.packed):
        _damage_a_chunk(second, published)
        _ask(second, "POST", f"/v1/images/{published.identifier}/verify?wait=60", {})
    assert len(_events(second, "chunk.repaired")) == 2
    # but for advice on the order, which peers do not give
    asked = [
        request
        for request in world.origin_requests()[before:]
        if not request[0].endswith(".bootset")
    ]
    assert asked == []

    _wait_for(lambda: _ask(second, "GET", "/v1/cache")["peers"][0]["served"] > 0)
    _wait_for(lambda: _ask(first, "GET", "/v1/cache")["peer_service"]["chunks"] > 0)
    shown = f"/v1/images/{world.lazy.identifier}"
    _wait_for(lambda: _ask(second, "GET", shown)["remote_bytes"] > 4 * MIB)
    lazy = _ask(second, "GET", shown)
    assert lazy["peer_bytes"] == lazy["remote_bytes"]
    (peer,) = _ask(second, "GET", "/v1/cache")["peers"]
    assert peer["location"] == f"https://{HOST}:{world.port}"
    assert (peer["failed"], peer["fault"], peer["rests_until"]) == (0, None, None)
    assert f"peer {HOST}" in second.run("cache", "status").stdout
    assert "to peers: " in first.run("cache", "status").stdout
    (checked,) = [
        check
        for check in json.loads(first.run("doctor", "--json").stdout)["checks"]
        if check["name"] == "peers"
    ]
    assert checked["verdict"] == "OK", checked
    _assert_secret(world)


def _assert_secret(world: World) -> None:
    token = world.site.token.encode()
    for appliance in (world.first, world.second):
        for path in [*appliance.root.rglob("*"), *world.site.folder.rglob("*")]:
            if path.is_file() and "blocks" not in path.parts and token in path.read_bytes():
                assert path.name == "token" and path.stat().st_mode & 0o077 == 0, path
        for pid in appliance.pids():
            process = Path(f"/proc/{pid}")
            assert token not in (process / "cmdline").read_bytes()
            assert token not in (process / "environ").read_bytes()


def _get(world: World, port: int) -> int:
    """Ask for a chunk that does not exist; 404 is what a peer that serves says."""
    context = ssl.create_default_context(cafile=str(world.site.folder / "ca.pem"))
    connection = http.client.HTTPSConnection(HOST, port, timeout=TIMEOUT_S, context=context)
    with closing(connection):
        headers = {"Authorization": f"Bearer {world.site.token}"}
        connection.request("GET", f"/v1/chunks/{'0' * 64}", headers=headers)
        return connection.getresponse().status


def test_who_serves_peers_may_die_and_its_host_too(world: World) -> None:
    """Peers that connect while the serving process is killed are answered by the next one. When the whole host goes, the other takes the image from the origin, leaves the host alone,
    and says so."""
    first, second = world.first, world.second
    for pid in first.pids("stratocache.api.peer_server"):
        os.kill(pid, signal.SIGKILL)
    assert _get(world, world.port) == 404
    _ask(second, "DELETE", f"/v1/images/{world.lazy.identifier}?wait=60")
    before = len(world.origin_requests())

    first.stop()
    _fetch(second, world.lazy, "lazy")
    assert _image_of(second, world.lazy) == world.lazy.image.read_bytes()
    assert len(world.origin_requests()) > before
    _wait_for(lambda: len(_events(second, "peer.left-alone")) == 1)
    (peer,) = _ask(second, "GET", "/v1/cache")["peers"]
    assert "connection failed" in peer["fault"]
