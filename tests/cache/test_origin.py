"""Origins against a real server: continuing, starting over, giving up, and what is refused."""

import hashlib
import os
import threading
from collections import deque
from pathlib import Path

import httpx
import pytest
import trio
from support.origins import Fault, OriginServer, Resource

from stratocache.cache.configuration import FetchSettings
from stratocache.cache.errors import NotFound, NotVerified, OriginFailed, Refused
from stratocache.cache.origin import Backoff, HttpOrigin, SizeLimit, open_file
from stratocache.cache.room import CacheSpace
from stratocache.cache.stage import Source, Stage

SIZE = 3_000_000
DATA = hashlib.shake_128(b"origin").digest(SIZE)
EXACT = SizeLimit(SIZE, exact=True)


class Download:
    """One download: its stage and the progress that it reported."""

    def __init__(self, directory: Path, attempts: int = 4, limit_s: float = 0.02) -> None:
        self.stage = Stage(directory / "stage")
        self.progress: list[tuple[int, int | None]] = []
        self._settings = FetchSettings(attempts=attempts, connect_timeout_s=2, read_timeout_s=1)
        self._backoff = Backoff(base_s=0.001, limit_s=limit_s)
        self._space = CacheSpace(directory, 0)

    def run(self, location: str, limit: SizeLimit = EXACT) -> bool:
        """Download to the end; tell whether an earlier part was continued."""

        async def download() -> bool:
            async with httpx.AsyncClient(trust_env=False) as client:
                origin = HttpOrigin(client, self._settings, self._space, self._backoff)
                return await origin.download(
                    location, self.stage, limit, lambda *step: self.progress.append(step)
                )

        return trio.run(download)


@pytest.fixture
def download(tmp_path: Path) -> Download:
    """A download into an empty stage."""
    return Download(tmp_path)


def test_a_whole_file_is_one_get(download: Download, origin: OriginServer) -> None:
    """A sound server is asked once, without HEAD or Range, and progress reaches the total."""
    url = origin.add("/image", DATA)

    assert not download.run(url)

    assert download.stage.source.read_bytes() == DATA
    assert [(r.method, r.range, r.status) for r in origin.log] == [("GET", None, 200)]
    assert download.progress[-1] == (SIZE, SIZE)
    assert download.progress == sorted(download.progress)


def test_a_cut_download_continues(download: Download, origin: OriginServer) -> None:
    """After two cuts the rest is asked for; no byte is sent twice."""
    faults = deque([Fault(cut_after_bytes=1_000_001), Fault(cut_after_bytes=1_000_003)])
    url = origin.add("/image", Resource(DATA, faults=faults))

    assert download.run(url)

    assert download.stage.source.read_bytes() == DATA
    assert [r.status for r in origin.log] == [200, 206, 206]
    assert [r.if_range for r in origin.log] == [None, '"v1"', '"v1"']
    assert origin.log[1].range == "bytes=1000001-"
    assert origin.sent_bytes("/image") == SIZE


def test_a_restarted_process_continues(tmp_path: Path, origin: OriginServer) -> None:
    """What an earlier process downloaded is not asked for again."""
    url = origin.add("/image", DATA)
    stage = Stage(tmp_path / "stage")
    stage.create()
    stage.restart(Source(url, '"v1"', SIZE))
    stage.source.write_bytes(DATA[:2_000_000])

    assert Download(tmp_path).run(url)

    assert stage.source.read_bytes() == DATA
    assert origin.sent_bytes("/image") == 1_000_000


def test_a_complete_download_is_not_asked_for_again(
    download: Download, origin: OriginServer
) -> None:
    """A stage whose source is whole needs no request."""
    url = origin.add("/image", DATA)
    download.run(url)

    assert download.run(url)

    assert len(origin.log) == 1


def test_last_modified_serves_when_there_is_no_strong_etag(
    download: Download, origin: OriginServer
) -> None:
    """With a weak ETag the date is the validator of the rest."""
    date = "Wed, 11 Nov 2026 11:11:11 GMT"
    faults = deque([Fault(cut_after_bytes=500_000)])
    url = origin.add("/image", Resource(DATA, etag='W/"weak"', last_modified=date, faults=faults))

    assert download.run(url)

    assert origin.log[1].if_range == date
    assert origin.sent_bytes("/image") == SIZE


@pytest.mark.parametrize(
    ("etag", "second"),
    [
        ('"v1"', Fault(ignore_range=True)),
        ('"v1"', Fault(status=416)),
        ('"v1"', Fault(headers={"Content-Range": "bytes 7-99/100"})),
        ('"v1"', Fault(headers={"Content-Range": f"bytes 500000-{SIZE - 1}/{SIZE + 1}"})),
        ('"v1"', Fault(headers={"ETag": '"v2"'})),
        (None, Fault()),
    ],
    ids=["range ignored", "416", "other part", "other total", "other etag", "no validator"],
)
def test_what_cannot_be_continued_starts_over(
    download: Download, origin: OriginServer, etag: str | None, second: Fault
) -> None:
    """Each way in which the rest may not belong to the first part ends in a whole new download."""
    faults = deque([Fault(cut_after_bytes=500_000), second])
    url = origin.add("/image", Resource(DATA, etag=etag, faults=faults))

    assert not download.run(url)

    assert download.stage.source.read_bytes() == DATA
    assert origin.log[-1].status == 200


def test_a_changed_file_starts_over(download: Download, origin: OriginServer) -> None:
    """When the ETag changes between two requests nothing of the old file remains."""
    url = origin.add("/image", Resource(bytes(SIZE), faults=deque([Fault(cut_after_bytes=99_999)])))
    download.stage.create()
    download.stage.restart(Source(url, '"v0"', SIZE))
    download.stage.source.write_bytes(b"old" * 100)
    origin.resources["/image"] = Resource(DATA, etag='"v2"')

    assert not download.run(url)

    assert download.stage.source.read_bytes() == DATA
    assert (origin.log[0].if_range, origin.log[0].status) == ('"v0"', 200)


def test_another_location_does_not_continue_this_one(
    download: Download, origin: OriginServer
) -> None:
    """A part of one URL is never completed from another."""
    first, second = origin.add("/first", bytes(SIZE)), origin.add("/second", DATA)
    download.stage.create()
    download.stage.restart(Source(first, '"v1"', SIZE))
    download.stage.source.write_bytes(bytes(1000))

    assert not download.run(second)

    assert download.stage.source.read_bytes() == DATA
    assert origin.log[0].range is None


def test_passing_failures_are_tried_again(download: Download, origin: OriginServer) -> None:
    """500 and 503 are followed by another attempt."""
    faults = deque([Fault(status=500), Fault(status=503, headers={"Retry-After": "1"})])
    url = origin.add("/image", Resource(DATA, faults=faults))

    download.run(url)

    assert [r.status for r in origin.log] == [500, 503, 200]


def test_retry_after_is_obeyed_within_a_limit() -> None:
    """The pause doubles, is at least what the server asks for, at most the limit."""
    backoff = Backoff(base_s=0.5, limit_s=60)

    pauses = [backoff.pause_s(failures, 0) for failures in (1, 2, 3, 20)]

    assert pauses == [0.5, 1, 2, 60]
    assert backoff.pause_s(1, 17) == 17
    assert backoff.pause_s(1, 86400) == 60


def test_attempts_end(tmp_path: Path, origin: OriginServer) -> None:
    """A server that only fails is asked as often as configured."""
    url = origin.add("/image", Resource(DATA, faults=deque([Fault(status=503)] * 10)))

    with pytest.raises(OriginFailed, match="503") as caught:
        Download(tmp_path, attempts=3).run(url)

    assert caught.value.code == "origin-failed"
    assert len(origin.log) == 3


def test_progress_resets_the_count_of_attempts(tmp_path: Path, origin: OriginServer) -> None:
    """A download that is cut more often than attempts are allowed, but advances, completes."""
    faults = deque([Fault(cut_after_bytes=300_000)] * 9)
    url = origin.add("/image", Resource(DATA, faults=faults))

    assert Download(tmp_path, attempts=2).run(url)

    assert origin.sent_bytes("/image") == SIZE
    assert len(origin.log) == 10


@pytest.mark.parametrize("status", [404, 410])
def test_gone_is_final(download: Download, origin: OriginServer, status: int) -> None:
    """404 and 410 are not tried again."""
    url = origin.add("/image", Resource(DATA, faults=deque([Fault(status=status)])))

    with pytest.raises(NotFound, match=str(status)) as caught:
        download.run(url)

    assert caught.value.code == "location-not-found"
    assert len(origin.log) == 1


@pytest.mark.parametrize("status", [204, 401, 403, 501])
def test_other_refusals_are_final(download: Download, origin: OriginServer, status: int) -> None:
    """What another attempt cannot change is not attempted."""
    url = origin.add("/image", Resource(DATA, faults=deque([Fault(status=status)])))

    with pytest.raises(OriginFailed, match=str(status)):
        download.run(url)

    assert len(origin.log) == 1


def test_nobody_listening_is_an_origin_failure(tmp_path: Path, origin: OriginServer) -> None:
    """A refused connection is tried again, then named."""
    with pytest.raises(OriginFailed, match="connection failed"):
        Download(tmp_path, attempts=2).run("http://127.0.0.1:1/image")


def test_redirects_are_followed(download: Download, origin: OriginServer) -> None:
    """Relative and absolute redirects lead to the file; the part belongs to the location."""
    target = origin.add("/target", Resource(DATA, faults=deque([Fault(cut_after_bytes=77_777)])))
    hop = origin.add("/hop", Resource(b"", faults=deque([_to(target)] * 2)))
    url = origin.add("/image", Resource(b"", faults=deque([_to("/hop")] * 2)))

    assert download.run(url)

    assert download.stage.source.read_bytes() == DATA
    assert [r.path for r in origin.log] == ["/image", "/hop", "/target"] * 2
    assert hop.endswith("/hop")
    assert origin.sent_bytes("/target") == SIZE


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "unix://127.0.0.1/x"]
)
def test_redirects_elsewhere_are_refused(
    download: Download, origin: OriginServer, target: str
) -> None:
    """A redirect never leads out of http and https."""
    url = origin.add("/image", Resource(b"", faults=deque([_to(target)])))

    with pytest.raises(Refused) as caught:
        download.run(url)

    assert caught.value.code == "location-refused"
    assert not download.stage.source.exists()


def test_a_circle_of_redirects_ends(download: Download, origin: OriginServer) -> None:
    """Redirects are counted."""
    url = origin.add("/image", Resource(b"", faults=deque([_to("/image")] * 50)))

    with pytest.raises(OriginFailed, match="redirects more than 10 times"):
        download.run(url)

    assert len(origin.log) == 11


def test_a_wrong_length_is_refused_before_the_body(
    download: Download, origin: OriginServer
) -> None:
    """A declared length that cannot be right costs no download."""
    url = origin.add("/image", DATA[:-1])

    with pytest.raises(NotVerified) as caught:
        download.run(url)

    assert caught.value.code == "size-mismatch"
    assert download.stage.downloaded_bytes() == 0


def test_an_endless_body_is_stopped(download: Download, origin: OriginServer) -> None:
    """Without a declared length the download ends once it exceeds the limit."""
    url = origin.add("/image", Resource(DATA * 2, declare_length=False))

    with pytest.raises(NotVerified) as caught:
        download.run(url, SizeLimit(100_000, exact=False))

    assert caught.value.code == "size-mismatch"
    assert download.stage.downloaded_bytes() < 300_000


def test_a_short_body_without_length_is_a_mismatch(
    download: Download, origin: OriginServer
) -> None:
    """A close-delimited body that is too short for an exact source is noticed."""
    url = origin.add("/image", Resource(DATA[:100], declare_length=False))

    with pytest.raises(NotVerified) as caught:
        download.run(url)

    assert caught.value.code == "size-mismatch"


def test_a_length_that_the_body_does_not_keep_is_a_failure(
    tmp_path: Path, origin: OriginServer
) -> None:
    """A server that always stops before its declared length fails in the end."""
    faults = deque([Fault(headers={"Content-Length": str(SIZE)})] * 5)
    url = origin.add("/image", Resource(b"", etag=None, faults=faults))
    origin.resources["/image"].declare_length = False

    with pytest.raises(OriginFailed):
        Download(tmp_path, attempts=2).run(url)


def test_a_silent_server_times_out(tmp_path: Path, origin: OriginServer) -> None:
    """A server that stops sending is given up after the read timeout."""
    release = threading.Event()
    fault = Fault(cut_after_bytes=1000, hold=release)
    url = origin.add("/image", Resource(DATA, faults=deque([fault])))

    with pytest.raises(OriginFailed, match="ReadTimeout"):
        Download(tmp_path, attempts=1).run(url)
    release.set()


def test_a_local_file_is_opened(tmp_path: Path) -> None:
    """A file URL with escapes names the file."""
    (tmp_path / "my image").write_bytes(b"raw")

    with open_file(f"file://{tmp_path}/my%20image") as file:
        assert file.read(10) == b"raw"


def test_a_missing_local_file_is_not_found(tmp_path: Path) -> None:
    """No such file is the same kind of error as 404."""
    with pytest.raises(NotFound) as caught:
        open_file(f"file://{tmp_path}/missing")

    assert caught.value.code == "location-not-found"


@pytest.mark.parametrize(
    "url", ["file://elsewhere/x", "file:///dev/zero", "file:///x?y", "file:///x#y", "file:///a%00b"]
)
def test_what_is_no_plain_file_is_refused(url: str) -> None:
    """Other hosts, devices and decorated URLs are not opened."""
    with pytest.raises(Refused) as caught:
        open_file(url)

    assert caught.value.code == "location-refused"


def test_pipes_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    """A FIFO without a writer does not block the fetch."""
    os.mkfifo(tmp_path / "pipe")

    for name in ("pipe", ""):
        with pytest.raises(Refused):
            open_file(f"file://{tmp_path}/{name}")


def _to(target: str) -> Fault:
    return Fault(status=302, headers={"Location": target})
