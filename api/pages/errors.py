"""Errors for people: a page instead of a problem document, and the way to the login."""

import json
from urllib.parse import quote

import falcon

from stratocache.api.pages.rendering import NAVIGATION, Pages
from stratocache.api.problem import MEDIA_TYPE

_PAGES = tuple(address for address, _name in NAVIGATION[1:])
_DOCUMENTS = ("/v1", "/healthz", "/readyz", "/metrics", "/openapi.json", "/static")


class ErrorPages:
    """Shows problems of pages as pages; the API's own stay what programs read."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def process_response(
        self,
        request: falcon.Request,
        response: falcon.Response,
        resource: object,
        succeeded: bool,
    ) -> None:
        """Replace a problem document by a page, or send who has not logged in to do so."""
        if response.content_type != MEDIA_TYPE or _is_below(request.path, _DOCUMENTS):
            return
        problem = json.loads(response.data or b"{}")
        is_page = request.path == "/" or _is_below(request.path, _PAGES)
        wants_page = "text/html" in request.accept
        if problem["status"] == 401 and (is_page or wants_page):
            wanted = quote(request.relative_uri, safe="")
            response.status = 303
            response.location = f"/login?next={wanted}"
            response.data = None
            response.content_type = falcon.MEDIA_HTML
        elif wants_page:
            response.data = None
            self._pages.show(request, response, "error", problem=problem)


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)
