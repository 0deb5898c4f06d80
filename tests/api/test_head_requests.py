"""HEAD: what GET answers, without the content, on every route that has a GET."""

import socket
from collections.abc import Iterator

import falcon
import falcon.inspect
import pytest
from support.api_daemon import Api, Requests, serving
from support.network_client import add_account, log_in, stranger
from support.page_world import furnish

from stratocache.api.application import create_app
from stratocache.cache.configuration import Configuration

pytestmark = pytest.mark.root

LENGTHS = {"etag", "content-length"}
"""Header fields that are others whenever the content is."""


@pytest.fixture
def api(configuration: Configuration) -> Iterator[Api]:
    """The application, which strangers may ask as often as they like."""
    settings = configuration.api.model_copy(update={"requests_per_s": 0})
    made = Api(configuration.model_copy(update={"api": settings}))
    yield made
    made.db.close()


def test_head_says_what_get_says(api: Api, root: Requests) -> None:
    """Status and header fields are the same, the length too, and no content comes; also of pages, of
    what is not there, and of what one may not see."""
    world = furnish(api.db, api.configuration.state_dir)
    add_account(api.db, "ann")
    routes = falcon.inspect.inspect_routes(create_app(api.configuration, api.db))
    paths = [
        route.path.replace("{uuid}", uuid)
        for route in routes
        for uuid in ((world.disk, world.private) if "{uuid}" in route.path else ("",))
        if any(method.method == "GET" and not method.internal for method in route.methods)
    ]
    assert len(paths) > 50
    callers = (root, log_in(stranger(api), "ann"), stranger(api))
    compared = 0
    for path in paths:
        for caller in callers:
            got, head, again = (caller(method, path) for method in ("GET", "HEAD", "GET"))
            assert head.status_code == got.status_code, path
            assert head.content == b"", path
            assert head.headers.keys() == got.headers.keys(), path
            same = got.content == again.content  # free space, ages and rates change by themselves
            compared += same
            for name, value in got.headers.items():
                if name != "x-request-id" and (same or name not in LENGTHS):
                    assert head.headers[name] == value, (path, name)
    assert compared > 2 * len(paths)


def test_other_routes_take_no_head(root: Requests, api: Api) -> None:
    """Where there is no GET there is no HEAD, and what may be sent is said with it."""
    refused = root("HEAD", "/v1/cache/evict")
    allowed = root("DELETE", "/v1/disks")

    assert refused.status_code == 405
    assert set(allowed.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}
    assert stranger(api)("HEAD", "/healthz").status_code == 200
    assert stranger(api)("HEAD", "/v1/disks").status_code == 401


def test_streams_are_not_begun(api: Api, root: Requests) -> None:
    """HEAD of a stream gives its place back at once, and is answered with what the stream is."""
    for _ in range(3 * api.configuration.api.threads):
        answer = root("HEAD", "/v1/events", headers={"Accept": "text/event-stream"})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers


def test_connection_goes_on_after_head(configuration: Configuration, api: Api) -> None:
    """On one connection to the real server no byte of content follows the head; the next request is
    answered; `If-None-Match` counts."""
    with serving(configuration), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(configuration.api_socket))
        reader = connection.makefile("rb")

        def ask(text: str) -> tuple[str, dict[str, str]]:
            connection.sendall(f"{text}\r\nHost: x\r\n\r\n".encode())
            status = reader.readline().decode()
            fields: dict[str, str] = {}
            while line := reader.readline().strip().decode():
                name, _, value = line.partition(": ")
                fields[name.lower()] = value
            return status.split()[1], fields

        status, fields = ask("HEAD /v1/disks HTTP/1.1")
        assert (status, fields["content-type"]) == ("200", "application/json")
        again, known = ask(f"HEAD /v1/disks HTTP/1.1\r\nIf-None-Match: {fields['etag']}")
        assert (again, known["etag"]) == ("304", fields["etag"])
        status, got = ask("GET /v1/disks HTTP/1.1")
        assert got["content-length"] == fields["content-length"]
        assert len(reader.read(int(got["content-length"]))) == int(fields["content-length"])
        assert status == "200"
