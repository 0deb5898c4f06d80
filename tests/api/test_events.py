"""`/v1/events`: pages and streams of what happened."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.api_daemon import IMAGE_ID, ROOT, Api, Requests, insert_disk, perform, problem, serving

from stratocache.api.resources import events as events_resource
from stratocache.cache.configuration import ApiSettings, Configuration
from stratocache.fs import disk_intents, image_intents
from stratocache.fs.records import Caller
from stratocache.fs.state import Database, record_event

pytestmark = pytest.mark.root

ANNA = Caller("nobody", "user")


class Stream:
    """One open stream of the real API process."""

    def __init__(self, configuration: Configuration, path: str, **headers: str) -> None:
        self._connection = http.client.HTTPConnection("api", timeout=60)
        self._connection.sock = socket.socket(socket.AF_UNIX)
        self._connection.sock.settimeout(60)
        self._connection.sock.connect(str(configuration.api_socket))
        self._connection.request("GET", path, headers={"Accept": "text/event-stream", **headers})
        self.answer = self._connection.getresponse()

    def lines(self) -> Iterator[str]:
        """Yield the lines as they come."""
        while line := self.answer.readline():
            yield line.decode().rstrip("\n")

    def take(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the next events: what `id` says, and the document."""
        found: list[tuple[str, dict[str, Any]]] = []
        number = ""
        for line in self.lines():
            if line.startswith("id: "):
                number = line[4:]
            elif line.startswith("data: "):
                found.append((number, json.loads(line[6:])))
                if len(found) == count:
                    break
        return found

    def close(self) -> None:
        """Go away without a word."""
        self._connection.close()


def record(db: Database, kind: str, subject: str) -> None:
    """Let something happen."""
    with db.transaction() as connection:
        record_event(connection, kind, subject, f"{subject} did {kind}.")


def test_events_are_whose_the_disk_is(api: Api, root: Requests, nobody: Requests) -> None:
    """A user sees what happened to their own disks, whoever did it and though it is gone, and to
    images; an administrator sees all."""
    mine, theirs = insert_disk(api.db, ANNA), insert_disk(api.db, ROOT)
    deletion = disk_intents.delete_disk(api.db, ROOT, mine)
    perform(api.db, deletion)
    record(api.db, "disk.deleted", mine)
    record(api.db, "image.verified", IMAGE_ID)
    record(api.db, "host.busy", "host")

    seen = nobody("GET", "/v1/events").json["events"]
    every = root("GET", "/v1/events").json["events"]

    assert [(item["kind"], item["subject"]) for item in seen] == [
        ("create-disk.requested", mine),
        ("delete-disk.requested", mine),
        ("disk.deleted", mine),
        ("image.verified", IMAGE_ID),
    ]
    assert theirs in {item["subject"] for item in every}
    assert len(every) == len(seen) + 2
    assert [item["number"] for item in every] == list(range(1, len(every) + 1))
    assert every[-1]["owner"] is None


def test_fetches_of_one_image_are_each_askers_own(api: Api, nobody: Requests) -> None:
    """Who asks for an image that somebody else asked for before is told of the own request only."""
    for caller in (ROOT, ANNA, ROOT):
        image_intents.request_fetch(api.db, caller, IMAGE_ID)

    seen = nobody("GET", "/v1/events").json["events"]
    assert [(item["kind"], item["owner"]) for item in seen] == [("fetch.requested", "nobody")]


def test_pages_go_both_ways(api: Api, root: Requests) -> None:
    """`after` is a number: onwards, or back with `sort=-number`."""
    for i in range(5):
        record(api.db, "host.busy", f"host-{i}")

    onwards = root("GET", "/v1/events", params={"after": 3, "limit": 1}).json
    back = root("GET", "/v1/events", params={"after": 3, "sort": "-number"}).json
    assert [item["number"] for item in onwards["events"]] == [4]
    assert onwards["next"] == "4"
    assert [item["number"] for item in back["events"]] == [2, 1]
    assert back["next"] is None


def test_stream_tells_what_happens_and_resumes(configuration: Configuration) -> None:
    """A stream begins now, tells events as they happen, and goes on where Last-Event-ID says,
    through a restart of the API; filters hold."""
    configuration = configuration.model_copy(update={"api": ApiSettings(workers=1, threads=16)})
    db = Database(configuration.database)
    db.migrate()
    record(db, "host.busy", "before")
    with serving(configuration):
        stream = Stream(configuration, "/v1/events")
        assert stream.answer.status == 200
        assert stream.answer.getheader("content-type", "").startswith("text/event-stream")
        assert next(stream.lines()).startswith("retry: ")
        record(db, "host.busy", "one")
        [(number, shown)] = stream.take(1)
        stream.close()
        assert (shown["subject"], number) == ("one", str(shown["number"]))
        record(db, "host.busy", "two")
    record(db, "host.idle", "three")
    with serving(configuration):
        resumed = Stream(configuration, "/v1/events", **{"Last-Event-ID": number})
        filtered = Stream(configuration, "/v1/events?after=0&kind=host.i&subject=three")

        assert [item["subject"] for _, item in resumed.take(2)] == ["two", "three"]
        record(db, "host.busy", "four")
        assert [item["subject"] for _, item in resumed.take(1)] == ["four"]
        assert [item["subject"] for _, item in filtered.take(1)] == ["three"]
        resumed.close()
        filtered.close()
    db.close()


def test_streams_leave_threads_for_others(configuration: Configuration) -> None:
    """A caller has a few streams, is told so when it wants more, is answered otherwise, and has the
    next as soon as it closes one, though nothing happens that could be told."""
    few = configuration.model_copy(update={"api": ApiSettings(workers=1, threads=2, group="none")})
    db = Database(configuration.database)
    db.migrate()
    with serving(few), ExitStack() as open_streams:
        streams = [Stream(few, "/v1/events") for _ in range(2)]
        for stream in streams:
            open_streams.callback(stream.close)
            assert stream.answer.status == 200
        refused = Stream(few, "/v1/events")
        open_streams.callback(refused.close)
        assert refused.answer.status == 429
        assert refused.answer.getheader("retry-after") == "10"
        assert json.loads(refused.answer.read())["code"] == "streams-rationed"
        page = Stream(few, "/v1/events", Accept="application/json")
        open_streams.callback(page.close)
        assert page.answer.status == 200

        streams[0].close()
        taken = 429
        while taken == 429:  # until the server has noticed
            again = Stream(few, "/v1/events")
            open_streams.callback(again.close)
            taken = again.answer.status
        assert taken == 200
    db.close()


def test_stream_says_that_it_is_there_and_ends(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet stream sends comments and ends after its time, so that rights are asked for anew."""
    monkeypatch.setattr(events_resource, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(events_resource, "STREAM_S_MAX", 0.3)
    with api.caller() as requests:
        answer = requests("GET", "/v1/events", headers={"Accept": "text/event-stream"})

    assert answer.status_code == 200
    assert ": still here\n\n" in answer.text


def test_bad_streams_are_refused(root: Requests) -> None:
    """What a stream cannot do is refused before it begins."""
    accept = {"Accept": "text/event-stream"}
    for parameters, headers, field in (
        ({"after": "x"}, {}, "after"),
        ({}, {"Last-Event-ID": "-1"}, "after"),
        ({"sort": "-number"}, {}, "sort"),
        ({"limit": "5"}, {}, "sort"),
    ):
        answer = root("GET", "/v1/events", params=parameters, headers={**accept, **headers})
        problem(answer, 400, "parameter-invalid", field)
