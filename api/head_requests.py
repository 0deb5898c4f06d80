"""HEAD: whatever GET would answer, without its content (RFC 9110, 9.3.2)."""

from typing import Any

import falcon


class App(falcon.App[falcon.Request, falcon.Response]):
    """Answers HEAD wherever a resource answers GET, by the same method; Falcon drops the content."""

    def add_route(self, uri_template: str, resource: object, **options: Any) -> None:
        """Add a route as Falcon does."""
        suffix = f"_{options['suffix']}" if options.get("suffix") else ""
        get = getattr(resource, f"on_get{suffix}", None)
        if get is not None and not hasattr(resource, f"on_head{suffix}"):
            setattr(resource, f"on_head{suffix}", get)
        super().add_route(uri_template, resource, **options)


class HeadRequests:
    """Middleware that closes what nobody will read; what it says of its length stays."""

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: Any, succeeded: bool
    ) -> None:
        """End a stream before it begins: Falcon would forget it, and with it what it holds."""
        if request.method == "HEAD" and response.stream is not None:
            close_stream(response)
            response.stream = iter(())


def close_stream(response: falcon.Response) -> None:
    """Close an answer's stream, which nobody will read, and forget it."""
    close = getattr(response.stream, "close", None)
    if close is not None:
        close()
    response.stream = None
