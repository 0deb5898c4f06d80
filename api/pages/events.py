"""`/events`: what happened."""

import falcon

from stratocache.api import answers
from stratocache.api.listing import Listing
from stratocache.api.pages.rendering import Pages
from stratocache.fs.events import events

EVENTS = Listing(orders=("created_at",), filters=("kind", "subject"))


class EventsPage:
    """`/events`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """List the events that the caller may see, latest first."""
        db, caller = self._pages.service.db, answers.caller(request)
        part, wanted, order = self._pages.part(request, EVENTS)
        found = events(db, caller, part, kind=wanted["kind"], subject=wanted["subject"])
        chosen, after = EVENTS.cut(found, part)
        self._pages.show(
            request, response, "events", events=chosen, next=after, order=order,
            filters={name: value or "" for name, value in wanted.items()},
        )  # fmt: skip
