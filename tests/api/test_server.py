"""The real API process on its Unix socket."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.api_daemon import Api, insert_image, listens, serving, standing_in

from stratocache.cache.configuration import Configuration
from stratocache.fs.listener import listen

pytestmark = pytest.mark.root  # callers are root, or are made from root


def ask(path: Path, method: str, address: str, **options: object) -> httpx.Response:
    """Send one request over a Unix socket."""
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://stratocache", timeout=60
    ) as client:
        return client.request(method, address, **options)  # type: ignore[arg-type]


def test_socket_is_for_owner_and_group_only(configuration: Configuration) -> None:
    """The socket has mode 0660 and the administrators' group when there is one."""
    with listen(configuration.api_socket, "nogroup"):
        status = configuration.api_socket.stat()

    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == 65534
    with listen(configuration.api_socket, "no-such-group"):  # replaces what was left
        assert configuration.api_socket.stat().st_gid == os.getgid()


def test_server_knows_its_caller_and_serves(configuration: Configuration, api: Api) -> None:
    """The real server takes the caller from the socket, and a disk can be made through it."""
    with serving(configuration), standing_in(api.db):
        index = ask(configuration.api_socket, "GET", "/v1").json()
        made = ask(configuration.api_socket, "POST", "/v1/disks", json={"size_bytes": 2**20})

    assert (index["caller"]["name"], index["caller"]["role"]) == ("root", "admin")
    assert made.status_code == 201
    assert configuration.api_socket.is_socket()  # it belongs to whoever listens


def test_chunked_body_beyond_the_limit_is_refused(configuration: Configuration, api: Api) -> None:
    """A body without a declared length is read to the limit only."""
    pieces = (b" " * 65536 for _ in range(17))
    with serving(configuration):
        answer = ask(
            configuration.api_socket, "POST", "/v1/disks",
            content=pieces, headers={"Content-Type": "application/json"},
        )  # fmt: skip

    assert answer.status_code == 413


def test_ordinary_users_cannot_connect(configuration: Configuration, api: Api) -> None:
    """The socket's mode keeps out who is not in the group."""
    configuration.run_dir.chmod(0o755)
    program = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    with serving(configuration):
        run = subprocess.run(
            [sys.executable, "-c", program, str(configuration.api_socket)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run.returncode != 0
    assert "PermissionError" in run.stderr


def test_long_waits_leave_threads_for_others(configuration: Configuration, api: Api) -> None:
    """More waiting requests than places for them and threads do not keep the API from answering."""
    path = configuration.api_socket
    answers: list[int] = []

    def wait() -> None:
        answers.append(
            ask(path, "POST", "/v1/images?wait=20", json={"reference": "held"}).status_code
        )

    with serving(configuration):
        count = 5 * configuration.api.threads + 2
        waiting = [threading.Thread(target=wait) for _ in range(count)]
        for thread in waiting:
            thread.start()
        before_s = time.monotonic()
        while len(ask(path, "GET", "/v1/operations").json()["operations"]) < len(waiting):
            assert time.monotonic() - before_s < 15
        assert ask(path, "GET", "/healthz").status_code == 200
        assert time.monotonic() - before_s < 15
        with standing_in(api.db, holding=""):
            for thread in waiting:
                thread.join()

    assert set(answers) <= {201, 202}
    assert 201 in answers


def test_killed_server_is_replaced(configuration: Configuration, api: Api) -> None:
    """After SIGKILL of master and workers a new server serves the same state on the same path."""
    insert_image(api.db)
    with serving(configuration) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert configuration.api_socket.exists()
        deadline = time.monotonic() + 20
        while listens(configuration.api_socket):  # workers follow their master
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with serving(configuration):
        assert len(ask(configuration.api_socket, "GET", "/v1/images").json()["images"]) == 1


def test_secrets_are_not_logged(
    configuration: Configuration, api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the most talkative level nothing that is logged holds a CHAP secret."""
    talkative = configuration.model_copy(update={"log_level": "debug"})
    with serving(talkative), standing_in(api.db):
        path = configuration.api_socket
        uuid = ask(path, "POST", "/v1/disks", json={"size_bytes": 2**20}).json()["uuid"]
        made = ask(path, "POST", f"/v1/disks/{uuid}/attachments", json={"instance": "vm"}).json()

    logged = "".join(capfd.readouterr())
    assert "api" in logged
    assert made["chap"]["secret"] not in logged
