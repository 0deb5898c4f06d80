"""Rendering: a template with what every page has, and errors as pages.

Nothing is trusted in a template: everything is escaped, and a name that nobody gave is an error.
The library is imported by who asks for a page first: launchers of the API never pay for it.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import falcon

from stratocache import __version__
from stratocache.api.authorisation import allows
from stratocache.api.listing import Listing
from stratocache.api.pages import formats
from stratocache.api.pages.static_files import StaticFiles
from stratocache.api.service import Service
from stratocache.fs.pages import Page
from stratocache.fs.records import Caller
from stratocache.fs.sessions import Session

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).resolve().parent / "templates"
NAVIGATION = (
    ("/", "Overview"),
    ("/images", "Images"),
    ("/disks", "Disks"),
    ("/attachments", "Attachments"),
    ("/operations", "Operations"),
    ("/events", "Events"),
    ("/cache", "Cache"),
    ("/accounts", "Accounts"),
    ("/audit", "Audit"),
)
_BUSY_REFRESH_S, _REFRESH_S = 2, 10
_NEWEST_FIRST = "-created_at"


@dataclass(frozen=True, slots=True)
class Order:
    """How a list is ordered and filtered, and the links that change the order."""

    sort: str
    filters: str
    """As a query; empty = all."""

    @property
    def parameters(self) -> str:
        """Everything that the next page needs too, as a query."""
        return "&".join(filter(None, (self.sort and f"sort={self.sort}", self.filters)))

    def link(self, field: str) -> str:
        """Return the address of the list ordered by a field, and the other way when it is."""
        sort = f"-{field}" if self.sort == field else field
        return "?" + "&".join(filter(None, (f"sort={sort}", self.filters)))

    def direction(self, field: str) -> str | None:
        """Return what `aria-sort` says of a column, None when it does not order."""
        return {field: "ascending", f"-{field}": "descending"}.get(self.sort)


class Pages:
    """What all pages share: the service, the templates, and the addresses of static files."""

    def __init__(self, service: Service, static: StaticFiles) -> None:
        self.service = service
        self._static = static
        self._lock = threading.Lock()
        self._environment: Environment | None = None

    def show(
        self,
        request: falcon.Request,
        response: falcon.Response,
        template: str,
        /,
        *,
        busy: bool = False,
        **context: Any,
    ) -> None:
        """Answer with a page; a `busy` one looks again soon whether something has changed."""
        caller: Caller | None = getattr(request.context, "caller", None)
        session: Session | None = getattr(request.context, "session", None)
        now = datetime.now(UTC)
        shown = {
            "path": request.path,
            "user": caller,
            "may": partial(allows, caller),
            "navigation": [item for item in NAVIGATION if allows(caller, "GET", item[0])],
            "csrf_token": session.csrf_token if session else "",
            "refresh_s": _BUSY_REFRESH_S if busy else _REFRESH_S,
            "version": __version__,
            "now": now,
            **context,
        }
        response.content_type = falcon.MEDIA_HTML
        response.text = self._made().get_template(f"{template}.html").render(shown)

    def part(
        self, request: falcon.Request, listing: Listing, *others: str, sort: str = _NEWEST_FIRST
    ) -> tuple[Page, dict[str, str | None], Order]:
        """Return which part of a list a request wants, newest first or as `sort` says, its filters, of which an empty one of a form is none, and links to other orders. `others` are
        parameters besides."""
        part = listing.page(request, sort=sort, others=others)
        given = {name: value or None for name, value in listing.filters_of(request).items()}
        return part, given, Order(request.get_param("sort") or sort, query_of(given))

    def _made(self) -> "Environment":
        with self._lock:
            if self._environment is None:
                self._environment = _environment(self._static)
            return self._environment


def query_of(filters: Mapping[str, str | None]) -> str:
    """Return filters as a query, without those that are not given."""
    return urlencode({name: value for name, value in filters.items() if value})


def _environment(static: StaticFiles) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    environment.filters.update(
        size=formats.size, exact_size=formats.exact_size, typed_size=formats.typed_size, percent=formats.percent,
        exact_time=formats.exact_time, relative_time=formats.relative_time, span=formats.span,
        short=formats.short,
    )  # fmt: skip
    environment.globals.update(asset=static.address, count=formats.count)
    return environment
