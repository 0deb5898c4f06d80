"""Places for what takes long: nobody keeps others from them, and they take nobody's threads."""

import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from support.api_daemon import ROOT, Api, serving
from support.contents import MIB, Contents
from support.network_client import add_account

from stratocache.api.places import Kind, Places
from stratocache.api.problem import HttpProblem
from stratocache.cache.configuration import ApiSettings, Configuration, SpaceSettings
from stratocache.cache.errors import Unreachable
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root

NOW = Kind("things-rationed", "things", "let one end", wait_s=0, retry_after_s=7)
PATIENT = Kind("things-rationed", "things", "let one end", wait_s=60, retry_after_s=7)
HURRY = "import dataclasses; import stratocache.api.service as s; "
HURRY += "s._TRANSFERS = dataclasses.replace(s._TRANSFERS, wait_s=0.2)"
"""Who has no place is told soon, so that tests need not wait for it."""
THREADS = 8
ANNA, BOB = Caller("anna", "user"), Caller("bob", "user")


def _refused(places: Places, caller: str) -> HttpProblem:
    with pytest.raises(HttpProblem) as caught:
        places.take(caller)
    return caught.value


def test_share_of_a_caller_and_the_last_places() -> None:
    """A caller has half of the places, the last quarter goes to who has none, and only who has none
    hears of others."""
    places = Places(NOW, 8)
    for caller in ("anna",) * 4:
        places.take(caller)
    assert _refused(places, "anna").status_code == 429  # though half are free
    for caller in ("bob",) * 2:
        places.take(caller)

    for caller, count in (("anna", 4), ("bob", 2)):
        told = _refused(places, caller)
        assert (told.status_code, told.problem_code) == (429, "things-rationed")
        assert told.headers == {"Retry-After": "7"}
        assert (
            told.description == f"You have {count} things here, and get no more now; let one end."
        )
    give_back = places.take("carl")
    places.take("dora")
    with pytest.raises(Unreachable) as caught:
        places.take("emil")
    assert caught.value.code == "server-busy"
    give_back()
    give_back()  # twice is once
    places.take("emil")
    with pytest.raises(Unreachable):
        places.take("fritz")


def test_who_waits_gets_the_place() -> None:
    """A place that becomes free goes to who waits for it; no more wait than there are places, and of
    one caller no more than it may have."""
    places = Places(PATIENT, 4)
    held = [places.take("anna"), places.take("anna")]
    taken: list[Callable[[], None]] = []
    waiting = [threading.Thread(target=lambda: taken.append(places.take("anna"))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while places.waiting < len(waiting):
        time.sleep(0.001)
    assert _refused(places, "anna").status_code == 429  # at once
    others = [places.take("bob")]
    for give_back in held:
        give_back()
    for thread in waiting:
        thread.join(60)

    assert len(taken) == 2
    assert places.waiting == 0
    for give_back in others + taken:
        give_back()


@pytest.fixture
def contents(configuration: Configuration) -> Iterator[Contents]:
    """A server with one worker and few threads; callers have accounts."""
    few = configuration.model_copy(
        update={
            "api": ApiSettings(workers=1, threads=THREADS, group="none"),
            "space": SpaceSettings(reserve_bytes=0),
        }
    )
    api = Api(few)
    for caller in (ANNA, BOB):
        add_account(api.db, caller.name)
    with serving(few, HURRY):
        yield Contents(few, api)
    api.db.close()


def _token(contents: Contents, caller: Caller) -> dict[str, str]:
    """Return what makes requests a caller's."""
    wanted = {"description": "test", "scopes": ["read", "disks"]}
    with contents.client() as client:
        answer = client.post(f"/v1/accounts/{caller.name}/tokens", json=wanted)
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def _begin_upload(contents: Contents, uuid: str, token: dict[str, str]) -> socket.socket:
    """Send all of an upload but for its last byte."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(str(contents.configuration.api_socket))
    head = f"PUT /v1/disks/{uuid}/content HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in token.items())
    connection.sendall(head.encode() + b"\r\n" + bytes(4096 - 1))
    return connection


def _answer(connection: socket.socket) -> tuple[bytes, dict[str, str]]:
    """Return the status line and the document of an answer."""
    received = b""
    while b"}" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"200 OK" in head or b"retry-after: 5" in head.lower()
    return head.split(b"\r\n")[0], json.loads(body)


def test_greedy_caller_keeps_nobody_from_transferring(contents: Contents) -> None:
    """A caller who begins as many uploads as it can, and ends none, gets half of the places and is
    told so for the others; meanwhile others transfer, and everybody is answered. When one has ended
    the next may begin."""
    greedy, other = _token(contents, ANNA), _token(contents, BOB)
    disks = [contents.add(MIB, owner=ANNA) for _ in range(3 * THREADS)]
    bobs = contents.add(MIB, owner=BOB)
    roots = contents.add(MIB, owner=ROOT)
    with ExitStack() as opened:
        begun = [opened.enter_context(_begin_upload(contents, uuid, greedy)) for uuid in disks]
        held = list(begun)
        while len(held) > THREADS // 2:
            [first, *_], _, _ = select.select(held, [], [], 60)
            held.remove(first)
            status, told = _answer(first)
            assert (status, told["code"]) == (
                b"HTTP/1.1 429 Too Many Requests", "transfers-rationed",
            )  # fmt: skip

        client = opened.enter_context(contents.client())
        for uuid, caller in ((bobs, other), (roots, {})):
            address = f"/v1/disks/{uuid}/content"
            written = client.put(address, content=b"x" * MIB, headers=caller)
            assert written.status_code == 200, written.text
            assert client.get(address, headers=caller).content == b"x" * MIB
        for caller in (greedy, other):
            assert client.get("/v1/disks", headers=caller).status_code == 200

        held[0].sendall(bytes(MIB - 4095))
        assert _answer(held[0])[0] == b"HTTP/1.1 200 OK"
        rest = disks[begun.index(held[0]) - 1]
        again = _until_placed(client, f"/v1/disks/{rest}/content", greedy)
        assert again.content == bytes(MIB)


def _until_placed(client: httpx.Client, address: str, caller: dict[str, str]) -> httpx.Response:
    """Download; the server may not have noticed yet that another transfer has ended."""
    while (answer := client.get(address, headers=caller)).status_code == 429:
        pass
    assert answer.status_code == 200, answer.text
    return answer


def test_commands_wait_for_their_turn(contents: Contents, tmp_path: Path) -> None:
    """`disk download` and `disk upload` that get no place wait until there is one."""
    held = [contents.add(MIB) for _ in range(THREADS // 2)]
    wanted = [contents.add(MIB, b"wanted") for _ in range(3)]
    (tmp_path / "new").write_bytes(b"n" * MIB)
    arguments = (("download", wanted[0], str(tmp_path / "file")), ("download", wanted[1], "-"),
                 ("upload", wanted[2], str(tmp_path / "new")))  # fmt: skip
    program = [sys.executable, "-m", "stratocache", "--socket"]
    program += [str(contents.configuration.api_socket), "disk"]
    with ExitStack() as opened:
        begun = [opened.enter_context(_begin_upload(contents, uuid, {})) for uuid in held]
        _until_held(contents, held)
        commands = [
            opened.enter_context(subprocess.Popen([*program, *words], stdout=subprocess.PIPE))
            for words in arguments
        ]
        refused: set[str] = set()
        while refused != set(wanted):
            time.sleep(0.05)
            lines = contents.db.rows("SELECT subject, status FROM audit WHERE status != 201")
            refused = {line["subject"] for line in lines}
            assert {line["status"] for line in lines} <= {429}
        for connection in begun:
            connection.close()
        outputs = [command.communicate(timeout=120)[0] for command in commands]

    assert [command.returncode for command in commands] == [0, 0, 0]
    assert (tmp_path / "file").read_bytes() == outputs[1] == b"wanted".ljust(MIB, b"\0")
    assert contents.read(wanted[2]) == b"n" * MIB


def _until_held(contents: Contents, disks: list[str]) -> None:
    """Return when the server is receiving content for all of these disks."""
    directory = contents.configuration.state_dir / "transfers"
    while not all((directory / f"upload-{uuid}").exists() for uuid in disks):
        time.sleep(0.01)
