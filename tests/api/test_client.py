"""The client: problem documents become our errors again."""

import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.api_daemon import ROOT, Api, end_badly, insert_disk, serving, standing_in
from support.relay import Limit, relay
from support.web_server import running

from stratocache.api.client import Client
from stratocache.api.problem import document_of
from stratocache.api.problem_titles import TITLES
from stratocache.cache import errors
from stratocache.cache.configuration import Configuration
from stratocache.fs import image_intents

pytestmark = pytest.mark.root  # callers are root, or are made from root


@contextmanager
def answering(path: Path, status: int, body: bytes) -> Iterator[Client]:
    """Serve one fixed answer on a Unix socket; yield a client of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class UnixServer(socketserver.UnixStreamServer):
        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            return super().get_request()[0], ("local", 0)

    with running(UnixServer(str(path), Handler)):
        yield Client(path)


@pytest.mark.parametrize("category", TITLES)
def test_every_category_crosses_the_wire(
    configuration: Configuration, category: type[errors.StratocacheError]
) -> None:
    """Category, code, sentence and field of an error are the same on the other side."""
    sent = category("some-code", "Do this.", field="size_bytes")
    body = json.dumps(document_of(sent)).encode()
    path = configuration.api_socket
    with answering(path, sent.http_status, body) as client, pytest.raises(category) as caught:
        client.get("/v1")

    assert type(caught.value) is category
    assert caught.value.to_record() == sent.to_record()


@pytest.mark.parametrize(
    ("status", "body", "category", "code"),
    [
        (200, b"[1]", errors.Internal, "answer-invalid"),
        (200, b"\xff", errors.Internal, "answer-invalid"),
        (404, b"<html>", errors.NotFound, "http-404"),
        (403, b'{"code":"password-wrong"}', errors.Refused, "password-wrong"),
        (412, b'{"code":"etag-mismatch"}', errors.Conflict, "etag-mismatch"),
        (429, b'{"code":"rate-limited"}', errors.Unreachable, "rate-limited"),
        (415, b"{}", errors.InvalidInput, "http-415"),
        (500, b"", errors.Internal, "http-500"),
    ],
)
def test_strange_answers_are_errors(
    configuration: Configuration,
    status: int,
    body: bytes,
    category: type[errors.StratocacheError],
    code: str,
) -> None:
    """An answer that is no problem document takes the nearest category."""
    path = configuration.api_socket
    with answering(path, status, body) as client, pytest.raises(category) as caught:
        client.get("/v1")

    assert caught.value.code == code


def test_no_daemon_is_said_with_its_socket(tmp_path: Path) -> None:
    """Without a daemon the error names the socket and what to start."""
    client = Client(tmp_path / "api.sock")
    with pytest.raises(errors.Unreachable) as caught:
        client.get("/v1")

    assert caught.value.code == "daemon-unreachable"
    assert str(tmp_path) in caught.value.message
    assert caught.value.exit_status == 10


def test_lists_are_read_to_their_end(configuration: Configuration, api: Api) -> None:
    """All pages of a list are followed."""
    made = [insert_disk(api.db) for _ in range(3)]
    with serving(configuration):
        client = Client(configuration.api_socket)
        disks = client.items("/v1/disks", "disks")

    assert [disk["uuid"] for disk in disks] == made


def test_following_survives_a_killed_server(configuration: Configuration, api: Api) -> None:
    """Who waits for an operation does not notice that the API was killed and started again."""
    operation = image_intents.request_fetch(api.db, ROOT, "held")
    client = Client(configuration.api_socket)
    seen: list[tuple[int, int | None]] = []
    ended: list[str] = []
    reported = threading.Event()

    def report(done_bytes: int, total_bytes: int | None) -> None:
        seen.append((done_bytes, total_bytes))
        reported.set()

    def follow(document: dict[str, object]) -> None:
        ended.append(client.follow(document, report)["state"])

    with serving(configuration) as process:
        document = client.get(f"/v1/operations/{operation.id}")
        thread = threading.Thread(target=follow, args=(document,))
        thread.start()
        api.db.connection.execute("UPDATE operations SET progress_bytes = 5, total_bytes = 9")
        assert reported.wait(20)
        process.kill()
    with serving(configuration), standing_in(api.db):
        thread.join()

    assert ended == ["done"]
    assert seen[0] == (5, 9)


def test_failed_operation_is_raised(configuration: Configuration, api: Api) -> None:
    """Following an operation that failed raises the error that was recorded."""
    operation = image_intents.request_fetch(api.db, ROOT, "x")
    record = {"category": "Refused", "code": "entry-expired", "message": "It has expired."}
    end_badly(api.db, operation.id, "failed", record)
    with serving(configuration):
        client = Client(configuration.api_socket)
        document = client.get(f"/v1/operations/{operation.id}")
        with pytest.raises(errors.Refused) as caught:
            client.follow(document, lambda _done, _total: None)

    assert caught.value.to_record() == record


class Cutting:
    """A server on a Unix socket that takes requests and hangs up on the first of them, when it has
    begun to answer."""

    def __init__(self, path: Path, cuts: int, begun_bytes: int) -> None:
        self.requests: list[bytes] = []
        self._cuts = cuts
        self._begun_bytes = begun_bytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(60)
                found = b""
                while b"\r\n\r\n" not in found or not (
                    found.endswith(b"}") or b"Content-Length" not in found
                ):
                    found += connection.recv(65536)
                self.requests.append(found)
                answer = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"done": 1}'
                if len(self.requests) > self._cuts:
                    connection.sendall(answer)
                else:
                    connection.sendall(answer[: self._begun_bytes])

    def close(self) -> None:
        """Serve nobody any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def keys(self) -> list[str]:
        """Return the idempotency keys of the requests."""
        return [
            line.partition(b": ")[2].decode()
            for request in self.requests
            for line in request.split(b"\r\n")
            if line.startswith(b"Idempotency-Key: ")
        ]


@contextmanager
def cutting(path: Path, cuts: int, begun_bytes: int = 0) -> Iterator[Cutting]:
    """Run a server that cuts connections until the end of the block."""
    server = Cutting(path, cuts, begun_bytes)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("begun_bytes", [0, 6, 15, 19, 40, 48])
def test_request_whose_connection_is_cut_is_sent_again(tmp_path: Path, begun_bytes: int) -> None:
    """Once, whether the answer had begun or not, in its head or later; a POST with the same key, each POST with its own."""
    path = tmp_path / "s"
    for method in ("get", "put", "delete", "post"):
        with cutting(path, 1, begun_bytes) as server:
            client = Client(path)
            body = {"a": 1}
            found = (
                client.post("/v1/x", body, wait=0) if method == "post"
                else client.put("/v1/x", body) if method == "put"
                else getattr(client, method)("/v1/x")
            )  # fmt: skip
            assert found == {"done": 1}
            first, second = server.requests
            assert first == second
            assert len(set(server.keys())) == (method == "post")
            client.post("/v1/x", body)
            assert len(set(server.keys())) == 1 + (method == "post")
        path.unlink()


def test_request_is_sent_twice_at_most(tmp_path: Path) -> None:
    """When the second connection is cut too it is an error; what must not be done twice, as its
    answer has a secret or it depends on what was, is sent once."""
    requests: list[tuple[Callable[[Client], object], int]] = [
        (lambda client: client.post("/v1/x", {}), 2), (lambda client: client.get("/v1/x"), 2),
        (lambda client: client.post_secret("/v1/x", {}), 1),
        (lambda client: client.patch("/v1/x", {}), 1),
    ]  # fmt: skip
    for number, (send, count) in enumerate(requests):
        path = tmp_path / str(number)
        with cutting(path, 9) as server:
            with pytest.raises(errors.Unreachable) as caught:
                send(Client(path))
            assert caught.value.code == "daemon-unreachable"
        assert len(server.requests) == count


def test_command_that_a_dying_process_took_is_carried_out_once(
    configuration: Configuration, api: Api, tmp_path: Path
) -> None:
    """The answer to a POST is lost on its way, and the thing is there once; one that is deleted is
    gone, though the second who asks finds nothing."""
    with (
        serving(configuration),
        standing_in(api.db),
        relay(tmp_path / "r", configuration.api_socket) as between,
    ):
        client = Client(between.path)
        between.limits.append(Limit("down", 20))
        made = client.post("/v1/disks", {"size_bytes": 2**20}, wait=20)
        assert [disk["uuid"] for disk in client.items("/v1/disks", "disks")] == [made["uuid"]]
        between.limits.append(Limit("down", 20))
        client.delete(f"/v1/disks/{made['uuid']}", wait=20)
        assert client.items("/v1/disks", "disks") == []
        with pytest.raises(errors.NotFound):
            client.delete(f"/v1/disks/{made['uuid']}")
    keys = api.db.rows("SELECT state FROM idempotency_keys")
    assert [row["state"] for row in keys] == ["done"]
