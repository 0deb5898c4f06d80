"""What a user types to name an image: `[catalogue:]path[@algorithm:hex]`.

The first colon ends a catalogue's name, `@md5:`, `@sha1:`, `@sha256:` or `@sha512:` at the end begins
a pin, and an `@` elsewhere belongs to an e-mail address. A full metadata URL of a configured
catalogue is read as that catalogue and the path below it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from stratocache.cache.errors import InvalidInput, NotFound

_MAX_CHARACTERS = 1024
_DIGEST_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
_CATALOGUE = re.compile(r"([a-z][a-z0-9-]*):(.*)", re.DOTALL)
_PIN = re.compile(r"(.*)@(md5|sha1|sha256|sha512):([^@/:]*)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"(?:https?|file)://", re.IGNORECASE)
_SEGMENT = re.compile(r"[^\x00-\x20\x7f/\\?#\"<>]{1,255}")


@dataclass(frozen=True)
class Reference:
    """A parsed reference; `pin` is an algorithm and its digest in lower-case hexadecimal."""

    catalogue: str
    path: str
    pin: tuple[str, str] | None = None

    def __str__(self) -> str:
        """Return the text that parses to this reference, whatever the default catalogue."""
        pin = "" if self.pin is None else f"@{self.pin[0]}:{self.pin[1]}"
        return f"{self.catalogue}:{self.path}{pin}"


def parse(text: str, default_catalogue: str, endpoints: Mapping[str, str]) -> Reference:
    """Read a reference; `endpoints` maps each configured catalogue's name to its endpoint.

    Raises `InvalidInput` with code `reference-invalid`, or `NotFound` with code
    `catalogue-unknown` when the reference names a catalogue or a URL that is not configured.
    """
    if len(text) > _MAX_CHARACTERS:
        raise _invalid(text[:40] + "…", f"it is longer than {_MAX_CHARACTERS} characters")
    remainder, pin = _split_pin(text)
    if _URL.match(remainder):
        catalogue, path = _below_endpoint(remainder, endpoints)
    elif match := _CATALOGUE.fullmatch(remainder):
        catalogue, path = match.groups()
    else:
        catalogue, path = default_catalogue, remainder
    if catalogue not in endpoints:
        raise NotFound(
            "catalogue-unknown",
            f"No catalogue {catalogue!r} is configured; "
            f"use one of {', '.join(sorted(endpoints)) or '(none)'} or add [catalogues.{catalogue}].",
            field="reference",
        )
    return Reference(catalogue, _checked_path(unquote(path), text), pin)


def endpoint_base(endpoint: str) -> str:
    """Return an endpoint in the form that paths are appended to: no trailing slash or `/metadata`."""
    return endpoint.rstrip("/").removesuffix("/metadata").rstrip("/")


def _split_pin(text: str) -> tuple[str, tuple[str, str] | None]:
    match = _PIN.fullmatch(text)
    if match is None:
        return text, None
    remainder, algorithm, digest = match.group(1), match.group(2).lower(), match.group(3).lower()
    digits = _DIGEST_DIGITS[algorithm]
    if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", digest):
        raise _invalid(text, f"a {algorithm} pin has {digits} hexadecimal digits")
    return remainder, (algorithm, digest)


def _below_endpoint(url: str, endpoints: Mapping[str, str]) -> tuple[str, str]:
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise _invalid(url, "a metadata URL has no query and no fragment")
    for catalogue, endpoint in endpoints.items():
        base = endpoint_base(endpoint)
        prefix = f"{base}/" if base.lower().startswith("file:") else f"{base}/metadata/"
        if url.startswith(prefix):
            return catalogue, url.removeprefix(prefix).removesuffix(".xml")
    raise NotFound(
        "catalogue-unknown",
        f"{url} belongs to no configured catalogue; add its Marketplace under [catalogues].",
        field="reference",
    )


def _checked_path(path: str, text: str) -> str:
    path = path.removesuffix("/")
    segments = path.split("/")
    if any(segment in (".", "..") or not _SEGMENT.fullmatch(segment) for segment in segments):
        raise _invalid(text, "the path needs non-empty segments without blanks, quotes, ? or #")
    return path


def _invalid(text: str, reason: str) -> InvalidInput:
    return InvalidInput(
        "reference-invalid",
        f"{text!r} is not a reference: {reason}. Write [catalogue:]path[@algorithm:hex].",
        field="reference",
    )
