"""Whether answers are what `/openapi.json` says of them."""

import json
import re
from functools import cache
from typing import Any

import jsonschema_rs

from stratocache.api.openapi import document

_BODILESS = (204, 304)


@cache
def description() -> dict[str, Any]:
    """The document, made once."""
    return document()


def check(method: str, path: str, status: int, content_type: str, body: bytes) -> None:
    """Fail unless an answer is one that the description of its route has."""
    template = _template(path.partition("?")[0])
    operations = description()["paths"].get(template, {})
    operation = operations.get(method.lower())
    if method == "HEAD" and operation is None:
        operation = operations.get("get")
    if operation is None:
        if content_type.startswith("text/html") or path.startswith("/static/"):
            return  # a page
        assert status >= 400, f"{method} {path} is not described"
        return
    answers = operation["responses"]
    answer = answers.get(str(status))
    if status in _BODILESS or method == "HEAD":
        assert status == 304 or answer is not None or status >= 400, (
            f"{method} {template}: {status}"
        )
        return
    if answer is None:
        assert status >= 400, f"{method} {template} answers {status}, which is not described"
        answer = answers["default"]
    media_type = content_type.partition(";")[0]
    assert media_type in answer.get("content", {}), f"{method} {template} {status}: {media_type}"
    if media_type.endswith(("/json", "+json")):
        found = answer["content"][media_type]["schema"]
        _validator(json.dumps(found, sort_keys=True)).validate(json.loads(body))


@cache
def _validator(schema: str) -> jsonschema_rs.Draft202012Validator:
    """Make a validator of a schema with all that it may refer to."""
    return jsonschema_rs.Draft202012Validator({
        **json.loads(schema), "components": description()["components"]
    })  # fmt: skip


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.sub(r"\\\{[a-z_]+\\\}", "[^/]+", re.escape(template))), template)
        for template in description()["paths"]
    ]


def _template(path: str) -> str:
    stripped = path.rstrip("/") or "/"
    for pattern, template in _patterns():
        if pattern.fullmatch(stripped):
            return template
    return ""
