"""Header fields that tell browsers what our answers may do: nothing that is not ours.

Sources: CSP Level 3, Fetch ("nosniff"), Referrer Policy, HTML ("Cross-Origin-Opener-Policy"), RFC
6797 (HSTS). They are on every answer, also the API's: one that a browser shows is inert.
"""

import falcon

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TRANSPORT_SECURITY = "max-age=31536000"
"""A year; without subdomains, which are not ours to decide about."""


class SecurityHeaders:
    """Puts the fields on every answer."""

    def process_response(
        self,
        request: falcon.Request,
        response: falcon.Response,
        resource: object,
        succeeded: bool,
    ) -> None:
        """Add the fields, and `no-store` to what says nothing of being kept: it may be secret."""
        response.set_headers(_HEADERS)
        if request.scheme == "https":
            response.set_header("Strict-Transport-Security", _TRANSPORT_SECURITY)
        if response.get_header("Cache-Control") is None:
            response.set_header("Cache-Control", "no-store")
