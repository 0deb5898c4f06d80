"""The API described by OpenAPI 3.1, made of the models and the tables of routes."""

import json
import re
from typing import Any

import falcon
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from stratocache import __version__
from stratocache.api.authorisation import Rule, rule_of
from stratocache.api.problem import MEDIA_TYPE
from stratocache.api.representations import Representation
from stratocache.api.route_table import ROUTES, Content, PageOf, Route, Schema

_PARAMETER = re.compile(r"\{([a-z_]+)\}")
_MODELS_AT = "#/components/schemas/{model}"
_PROBLEM: Schema = {
    "type": "object",
    "description": "What went wrong (RFC 9457).",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "A sentence that says what to do."},
        "code": {"type": "string", "description": "Stable."},
        "field": {"type": "string", "description": "The input that is to blame."},
        "instance": {"type": "string", "description": "The operation that failed."},
    },
    "additionalProperties": False,
}
_SECURITY: Schema = {
    "token": {"type": "http", "scheme": "bearer", "description": "A token of ours or of OIDC."},
    "session": {
        "type": "apiKey", "in": "cookie", "name": "__Host-stratocache",
        "description": "Other requests than GET need X-CSRF-Token.",
    },
}  # fmt: skip
_SHAPES: dict[str, Schema] = {
    "uuid": {"type": "string", "format": "uuid"},
    "snapshot_id": {"type": "string", "format": "uuid"},
    "attachment_id": {"type": "string", "format": "uuid"},
    "operation_id": {"type": "string", "format": "uuid"},
    "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "instance": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
    "user": {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}$"},
    "image_id": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
}
"""Of the parts of addresses; all others are texts."""


class OpenApi:
    """`/openapi.json`."""

    def __init__(self) -> None:
        self._content: bytes | None = None

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Answer with the description of this API."""
        if self._content is None:
            self._content = json.dumps(document()).encode()
        response.content_type = falcon.MEDIA_JSON
        response.data = self._content


def document() -> Schema:
    """Return the description."""
    schemas, references = _schemas()
    paths: dict[str, Schema] = {}
    for (method, template), route in ROUTES.items():
        shown = _operation(method, template, route, rule_of(method, template), references)
        paths.setdefault(template, {})[method.lower()] = shown
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stratocache",
            "version": __version__,
            "description": "Cached VM images and persistent disks of one host. "
            "HEAD is answered wherever GET is.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Problem": _PROBLEM},
            "securitySchemes": _SECURITY,
        },
        "security": [{"token": []}, {"session": []}],
    }


def _schemas() -> tuple[dict[str, Any], dict[type[BaseModel], Schema]]:
    """Return the schemas of all models, and a reference to each."""
    answered: set[type[BaseModel]] = set()
    asked: set[type[BaseModel]] = set()
    for route in ROUTES.values():
        asked |= {body for body in route.body.values() if isinstance(body, type)}
        for contents in route.answers.values():
            for content in contents.values():
                answered |= set(_models(content))
    wanted = [(model, "serialization") for model in sorted(answered, key=lambda m: m.__name__)]
    wanted += [(model, "validation") for model in sorted(asked, key=lambda m: m.__name__)]
    found, definitions = models_json_schema(
        wanted,  # type: ignore[arg-type]
        ref_template=_MODELS_AT,
    )
    references: dict[type[BaseModel], Schema] = {
        model: reference  # type: ignore[misc]
        for (model, _), reference in found.items()
    }
    return definitions.get("$defs", {}), references


def _models(content: Content) -> list[type[Representation]]:
    if isinstance(content, PageOf):
        return [content.item]
    if isinstance(content, type):
        return [content]
    return [item for item in content.get("anyOf", []) if isinstance(item, type)]


def _operation(
    method: str,
    template: str,
    route: Route,
    rule: Rule | None,
    references: dict[type[BaseModel], Schema],
) -> Schema:
    named = re.sub(r"[^a-z0-9]+", "_", f"{method} {template}".lower()).strip("_")
    shown: Schema = {
        "operationId": named,
        "summary": route.summary,
        "tags": [template.removeprefix("/v1").split("/")[1] if template != "/v1" else "service"],
        "parameters": _parameters(method, template, route),
        "responses": {
            **{
                str(status): _answer(status, contents, references, head=method == "HEAD")
                for status, contents in route.answers.items()
            },
            **{str(status): _problem(when) for status, when in route.problems.items()},
            "default": _problem("A problem."),
        },
    }
    if route.body:
        shown["requestBody"] = {
            "required": True,
            "content": {
                media_type: {"schema": references[body] if isinstance(body, type) else body}
                for media_type, body in route.body.items()
            },
        }
    if rule is not None and rule.open:
        shown["security"] = []
    elif rule is not None:
        scope = rule.scope or "any"
        shown["description"] = f"Needs the role {rule.role} and a token with the scope {scope}."
    return shown


def _problem(when: str) -> Schema:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": when, "content": {MEDIA_TYPE: {"schema": schema}}}


def _parameters(method: str, template: str, route: Route) -> list[Schema]:
    found: list[Schema] = [
        {"name": name, "in": "path", "required": True,
         "schema": _SHAPES.get(name, {"type": "string"})}
        for name in _PARAMETER.findall(template)
    ]  # fmt: skip
    found += [
        {"name": name, "in": "query", "schema": schema} for name, schema in route.parameters.items()
    ]
    headers = dict(route.headers)
    if method == "POST":
        headers["Idempotency-Key"] = {"type": "string", "minLength": 1, "maxLength": 255}
    found += [{"name": name, "in": "header", "schema": schema} for name, schema in headers.items()]
    return found


def _answer(
    status: int, contents: Any, references: dict[type[BaseModel], Schema], *, head: bool
) -> Schema:
    shown: Schema = {"description": falcon.code_to_http_status(status)}
    if contents and not head:
        shown["content"] = {
            media_type: {"schema": _schema(content, references)}
            for media_type, content in contents.items()
        }
    return shown


def _schema(content: Content, references: dict[type[BaseModel], Schema]) -> Schema:
    if isinstance(content, PageOf):
        return {
            "type": "object",
            "required": [content.name, "next"],
            "properties": {
                content.name: {"type": "array", "items": references[content.item]},
                "next": {"type": ["string", "null"]},
            },
            "additionalProperties": False,
        }
    if isinstance(content, type):
        return references[content]
    if "anyOf" in content:
        return {"anyOf": [references[item] for item in content["anyOf"]]}
    return content
