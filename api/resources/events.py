"""`/v1/events`: what happened, a page at a time or as it happens (server-sent events).

A stream is what the HTML standard, section 9.2, calls an event stream: each event has its number
as `id`, so a client that comes back with `Last-Event-ID` misses none. Who comes without a number
gets what happens from now on. A comment goes out when nothing happens for a while; after ten
minutes the stream ends, and the client, who comes back by itself, is asked anew who it is.
"""

import select
import socket
import time
from collections.abc import Callable, Iterator

import falcon

from stratocache.api import answers, query
from stratocache.api.listing import Listing
from stratocache.api.representations import EventView
from stratocache.api.service import Service
from stratocache.cache.errors import InvalidInput
from stratocache.fs.events import Event, events, latest_number
from stratocache.fs.pages import Page

STREAM_TYPE = "text/event-stream"
EVENTS = Listing(orders=("number",), filters=("kind", "subject"))
STREAM_S_MAX = 600
HEARTBEAT_S = 15
_POLL_S = 0.2
_BATCH = 200
_RETRY_MS = 2000


class EventCollection:
    """`/v1/events`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List events, or stream them when `Accept` says so: the caller's and those of images; all
        for operators. `?kind=` chooses kinds that begin so."""
        query.require_known(request, *EVENTS.parameters)
        if STREAM_TYPE in (request.accept or ""):
            self._stream(request, response)
            return
        descending = query.choice(request, "sort", *EVENTS.sorts) == "-number"
        after = query.event_number(request.get_param("after"), "after")
        page = Page(
            limit=query.page_length(request),
            descending=descending,
            after=None if after is None else ("", after),
        )
        found = events(
            self._service.db, answers.caller(request), page, **EVENTS.filters_of(request)
        )
        chosen = found[: page.limit]
        more = str(chosen[-1].number) if len(found) > len(chosen) else None
        answers.show_page(response, "events", [_view(event) for event in chosen], more)

    def _stream(self, request: falcon.Request, response: falcon.Response) -> None:
        if request.get_param("sort") or request.get_param("limit"):
            raise InvalidInput(
                "parameter-invalid", "A stream has neither sort nor limit.", field="sort"
            )
        text = request.get_header("Last-Event-ID") or request.get_param("after")
        after = query.event_number(text, "after")
        db, caller = self._service.db, answers.caller(request)
        wanted = EVENTS.filters_of(request)

        def look(number: int) -> list[Event]:
            return events(db, caller, Page(_BATCH, after=("", number)), **wanted)[:_BATCH]

        start = latest_number(db) if after is None else after
        give_back = self._service.stream(caller)
        response.content_type = STREAM_TYPE
        response.cache_control = ["no-store"]
        response.set_header("X-Accel-Buffering", "no")
        connection = request.env.get("gunicorn.socket")
        response.stream = _Stream(self._service, look, start, connection, give_back)


class _Stream:
    """The bytes of one stream; gives back its place when the server closes it."""

    def __init__(
        self,
        service: Service,
        look: Callable[[int], list[Event]],
        number: int,
        connection: socket.socket | None,
        give_back: Callable[[], None],
    ) -> None:
        self._service = service
        self._look = look
        self._number = number
        self._hang_up = select.poll()
        if connection is not None:
            self._hang_up.register(connection, select.POLLRDHUP)
        self._give_back = give_back

    def __iter__(self) -> Iterator[bytes]:
        yield b"retry: %d\n: events follow\n\n" % _RETRY_MS
        ends_s = time.monotonic() + STREAM_S_MAX
        quiet_s = time.monotonic()
        seen: int | None = None
        while time.monotonic() < ends_s and not self._service.is_ending():
            version = self._service.db.data_version()
            found = self._look(self._number) if version != seen else []
            seen = version if len(found) < _BATCH else None
            if found:
                self._number = found[-1].number
                quiet_s = time.monotonic()
                yield b"".join(_message(event) for event in found)
            elif time.monotonic() - quiet_s >= HEARTBEAT_S:
                quiet_s = time.monotonic()
                yield b": still here\n\n"
            elif self._hang_up.poll(_POLL_S * 1000):
                return

    def close(self) -> None:
        """Let another stream have the place."""
        self._give_back()


def _message(event: Event) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (event.number, _view(event).to_json())


def _view(event: Event) -> EventView:
    return EventView.from_record(event)
