"""A read-only Marketplace over a folder of entries, with the original read URLs.

    /metadata                        list
    /metadata/{a}[/{b}]              list; each segment is an identifier, an e-mail or a date
    /metadata/{id}/{email}/{date}    one entry, the published bytes untouched
    /images/NAME                     image files with byte ranges, when a folder of them is given

The same `/metadata` URLs answer below `/marketplace`. A list shows, of each endorser and image, the
newest endorsement, unless that is expired or deprecated; `status=expired`, `deprecated` or anything
else (all) asks for others. The server vouches for nothing: readers verify every entry themselves.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.sax.saxutils import escape

import falcon
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

from stratocache.cache import constraints, document
from stratocache.cache.errors import StratocacheError
from stratocache.cache.identifier import is_identifier
from stratocache.cache.metadata import DATE_FORMAT

log = logging.getLogger(__name__)

_MAX_ENTRIES = 100_000
_ENTRY_TYPE = "application/rdf+xml"
_LIST_TYPE = "application/xml"
_DECLARATION = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*<\?xml[^>]*\?>\s*")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_FILTERS = ("identifier", "email", "created")


@dataclass(frozen=True)
class Listing:
    """What the folder's index keeps of one file."""

    path: Path
    identifier: str
    email: str
    created: str
    deprecated: bool
    valid_until: datetime | None

    def data(self) -> bytes:
        """Return the published bytes; none when the file is gone since it was listed."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def status(self, now: datetime) -> str:
        """Return valid, expired or deprecated."""
        if self.deprecated:
            return "deprecated"
        if self.valid_until is not None and self.valid_until <= now:
            return "expired"
        return "valid"


class Shelf:
    """The entries below a folder, wherever their files lie; read again when a file changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[tuple[int, int], Listing | None]] = {}

    def listings(self) -> list[Listing]:
        """Return every entry, newest first."""
        with self._lock:
            known = {}
            for path in sorted(self._folder.rglob("*.xml"))[:_MAX_ENTRIES]:
                try:
                    state = path.stat()
                except OSError:
                    continue
                stamp = (state.st_mtime_ns, state.st_size)
                cached = self._known.get(path)
                known[path] = cached if cached and cached[0] == stamp else (stamp, _read(path))
            self._known = known
            found = [listing for _, listing in known.values() if listing is not None]
        return sorted(found, key=lambda listing: (listing.created, str(listing.path)), reverse=True)


def _read(path: Path) -> Listing | None:
    try:
        entry = document.parse_one(document.read(path))
        metadata = constraints.check(entry)
    except StratocacheError as error:
        log.warning("%s is not served: %s", path, error.message)
        return None
    if not entry.signatures:
        log.warning("%s is not signed; readers will refuse it", path)
    endorsement = metadata.endorsement
    assert endorsement is not None, "checked without leave to lack one"
    return Listing(
        path,
        metadata.identifier,
        endorsement.email,
        endorsement.created.strftime(DATE_FORMAT),
        metadata.deprecated is not None,
        metadata.valid_until,
    )


class Lists:
    """`/metadata` and its two shorter forms."""

    def __init__(self, shelf: Shelf, clock: Callable[[], datetime]) -> None:
        self._shelf = shelf
        self._clock = clock

    def on_get(
        self, req: falcon.Request, resp: falcon.Response, first: str = "", second: str = ""
    ) -> None:
        """Answer the matching entries, each as it was published, in one `<metadata>`."""
        wanted = {name: value for name in _FILTERS if (value := req.get_param(name))}
        wanted |= dict(_classify(segment) for segment in (first, second) if segment)
        chosen = _filter(
            self._shelf.listings(), wanted, req.get_param("status") or "valid", self._clock()
        )
        documents = [_DECLARATION.sub(b"", data) for listing in chosen if (data := listing.data())]
        if not documents and wanted:
            raise falcon.HTTPNotFound(title="no metadata matching query found")
        resp.content_type = _LIST_TYPE
        resp.data = b"\n".join(
            [b'<?xml version="1.0" encoding="UTF-8"?>', b"<metadata>", *documents, b"</metadata>\n"]
        )

    on_head = on_get


class Entries:
    """`/metadata/{id}/{email}/{created}`."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def on_get(
        self, req: falcon.Request, resp: falcon.Response, first: str, second: str, third: str
    ) -> None:
        """Answer one entry's bytes."""
        wanted = dict(map(_classify, (first, second, third)))
        if set(wanted) != set(_FILTERS):
            raise falcon.HTTPNotFound(title="an entry is identifier, e-mail and date")
        for listing in self._shelf.listings():
            if _matches(listing, wanted) and (data := listing.data()):
                resp.data = data
                resp.content_type = _ENTRY_TYPE
                resp.etag = hashlib.sha256(data).hexdigest()
                resp.downloadable_as = f"{listing.identifier}.xml"
                return
        raise falcon.HTTPNotFound(title="no metadata matching query found")

    on_head = on_get


def create_app(
    folder: Path,
    *,
    images: Path | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> "falcon.App[falcon.Request, falcon.Response]":
    """Return the WSGI application that serves `folder`."""
    app = falcon.App()
    app.set_error_serializer(_write_error)
    shelf = Shelf(folder)
    lists, entries = Lists(shelf, clock), Entries(shelf)
    for prefix in ("", "/marketplace"):
        app.add_route(f"{prefix}/metadata", lists)
        app.add_route(f"{prefix}/metadata/{{first}}", lists)
        app.add_route(f"{prefix}/metadata/{{first}}/{{second}}", lists)
        app.add_route(f"{prefix}/metadata/{{first}}/{{second}}/{{third}}", entries)
    if images is not None:
        app.add_static_route("/images", str(images.resolve()))
    return app


class Server(BaseApplication):  # type: ignore[misc]
    """The application under gunicorn: one process, several threads; `run` ends with the process."""

    def __init__(
        self,
        folder: Path,
        *,
        address: str,
        port: int,
        images: Path | None,
        announce: Callable[[str, int], None],
    ) -> None:
        self._folder = folder
        self._images = images
        self._bind = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._announce = announce
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's options."""

        def announce(arbiter: object) -> None:
            host, port = arbiter.LISTENERS[0].sock.getsockname()[:2]  # type: ignore[attr-defined]
            self._announce(host, port)

        options = {
            "bind": [self._bind],
            "workers": 1,
            "worker_class": "gthread",
            "threads": 8,
            "loglevel": "warning",
            "graceful_timeout": 2,
            "control_socket_disable": True,
            "when_ready": announce,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> "falcon.App[falcon.Request, falcon.Response]":
        """Make the application, in the worker."""
        return create_app(self._folder, images=self._images)


def _classify(segment: str) -> tuple[str, str]:
    if "@" in segment:
        return "email", segment
    if _DATE.fullmatch(segment):
        return "created", segment
    if is_identifier(segment):
        return "identifier", segment
    raise falcon.HTTPNotFound(title=f"{segment[:60]} is no identifier, e-mail or date")


def _filter(
    listings: Iterable[Listing], wanted: dict[str, str], status: str, now: datetime
) -> list[Listing]:
    matching = [listing for listing in listings if _matches(listing, wanted)]
    if status not in ("valid", "expired", "deprecated"):
        return matching
    if "created" not in wanted:
        newest: dict[tuple[str, str], Listing] = {}
        for listing in matching:
            newest.setdefault((listing.identifier, listing.email), listing)
        matching = list(newest.values())
    return [listing for listing in matching if listing.status(now) == status]


def _matches(listing: Listing, wanted: dict[str, str]) -> bool:
    return all(getattr(listing, name) == value for name, value in wanted.items())


def _write_error(_: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    resp.content_type = _LIST_TYPE
    resp.text = f"<error>{escape(error.title or str(error.status))}</error>\n"
