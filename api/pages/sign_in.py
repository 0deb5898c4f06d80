"""`/login` and `/logout`: plain forms, so that they work without a script too.

The script of the pages uses `/v1/session` instead; both have the same ration and the same cookie.
"""

import hmac
from urllib.parse import parse_qs

import falcon

from stratocache.api.login import Login, cookie_name, forget_cookie
from stratocache.api.pages.rendering import Pages
from stratocache.api.problem import HttpProblem
from stratocache.api.request_origin import require_same_origin
from stratocache.cache.errors import InvalidInput
from stratocache.fs.sessions import end_session, judge_session

_FORM_TYPE = "application/x-www-form-urlencoded"
_FORM_BYTES_MAX = 16 * 1024


class LoginPage:
    """`/login`."""

    def __init__(self, pages: Pages, login: Login) -> None:
        self._pages = pages
        self._login = login

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Ask for name and password; `?next=` is where to go then."""
        self._ask(request, response, request.get_param("next") or "/")

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Log in, and go where somebody wanted to; or ask again."""
        require_same_origin(request)
        form = _form(request)
        name = form.get("name", "")
        try:
            self._login.start(request, response, name, form.get("password", ""))
        except HttpProblem as problem:
            response.status = problem.status
            response.set_headers(problem.headers or {})
            self._ask(request, response, form.get("next", "/"), name, problem.description)
        else:
            response.status = 303
            response.location = local_address(form.get("next", "/"))

    def _ask(
        self,
        request: falcon.Request,
        response: falcon.Response,
        wanted: str,
        name: str = "",
        fault: str | None = None,
    ) -> None:
        self._pages.show(
            request, response, "login", next=local_address(wanted), name=name, fault=fault
        )


class LogoutPage:
    """`/logout`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Ask whether to log out: reading a page changes nothing."""
        self._pages.show(request, response, "logout")

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """End the session that the cookie is of, if a page of ours asks for it."""
        require_same_origin(request)
        cookies = request.get_cookie_values(cookie_name(request)) or []
        service = self._pages.service
        idle_s = service.configuration.api.session_idle_s
        found = judge_session(service.db, cookies[0], idle_s) if cookies else None
        if found is not None:
            account, session = found
            sent = _form(request).get("csrf_token", "")
            if not hmac.compare_digest(sent.encode(), session.csrf_token.encode()):
                raise HttpProblem(403, "csrf-token-wrong", "Log out on a page of this appliance.")
            request.context.caller = account.caller
            end_session(service.db, session.secret)
        forget_cookie(request, response)
        response.status = 303
        response.location = "/login"


def local_address(text: str) -> str:
    """Return an address of this site that a browser takes for nothing else, or the overview."""
    is_local = text.startswith("/") and not text.startswith(("//", "/\\", "/login", "/logout"))
    return text if is_local and text.isascii() and text.isprintable() else "/"


def _form(request: falcon.Request) -> dict[str, str]:
    """Return the fields of a form; raises `HttpProblem` 415, `InvalidInput` (`body-invalid`)."""
    if (request.content_type or "").partition(";")[0].strip().lower() != _FORM_TYPE:
        raise HttpProblem(415, "body-not-form", f"Send a form: {_FORM_TYPE}.")
    content = request.bounded_stream.read(_FORM_BYTES_MAX + 1)
    if len(content) > _FORM_BYTES_MAX:
        raise HttpProblem(413, "body-too-large", f"A form may have {_FORM_BYTES_MAX} bytes.")
    try:
        fields = parse_qs(content.decode("ascii"), errors="strict", max_num_fields=10)
    except ValueError:
        raise InvalidInput("body-invalid", "The form is not encoded as forms are.") from None
    return {name: values[0] for name, values in fields.items()}
