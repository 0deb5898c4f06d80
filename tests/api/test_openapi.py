"""`/openapi.json`: complete, valid, and true of the application.

That answers are as they are described is checked by `support.conformity` in all tests of the API.
"""

import json

import falcon.inspect
import jsonschema_rs
import pytest
import schemathesis
from falcon import testing
from support.api_daemon import Api, Requests

from stratocache.api.application import create_app
from stratocache.api.authorisation import RULES
from stratocache.api.openapi import document
from stratocache.api.route_table import ROUTES

pytestmark = pytest.mark.root


def test_every_route_is_described(api: Api) -> None:
    """What the application serves as its API, and only that, has a row and a description."""
    app = create_app(api.configuration, api.db)
    served = {
        (method.method, route.path)
        for route in falcon.inspect.inspect_routes(app)
        for method in route.methods
        if not method.internal
    }
    described = {
        (method.upper(), path)
        for path, operations in document()["paths"].items()
        for method in operations
    }
    ours = {(method, path) for method, path in served if _is_api(path)}
    heads = {("HEAD", path) for method, path in ours if method == "GET"}

    assert set(ROUTES) == described
    assert ours == described | heads
    assert ours - heads <= set(RULES)


def _is_api(path: str) -> bool:
    return path.startswith("/v1") or path in ("/healthz", "/readyz", "/metrics", "/openapi.json")


def test_the_document_is_open_and_the_same_for_all(api: Api, root: Requests) -> None:
    """Anybody gets the document that the models make, without saying who it is."""
    stranger = testing.TestClient(create_app(api.configuration, api.db))

    assert stranger.simulate_get("/openapi.json").json == json.loads(json.dumps(document()))
    assert root("GET", "/openapi.json").json == document()


def test_the_document_is_valid_openapi() -> None:
    """schemathesis reads it as OpenAPI 3.1, and every schema in it is a JSON schema whose references
    lead somewhere."""
    described = document()
    schema = schemathesis.openapi.from_dict(described)

    assert len(list(schema.get_all_operations())) == len(ROUTES)
    jsonschema_rs.meta.validate({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": described["components"]["schemas"],
    })  # fmt: skip
    text = json.dumps(described)
    for name in described["components"]["schemas"]:
        jsonschema_rs.Draft202012Validator({
            "$ref": f"#/components/schemas/{name}", "components": described["components"]
        })  # fmt: skip
    names = {item["operationId"] for path in described["paths"].values() for item in path.values()}
    assert len(names) == len(ROUTES)
    assert "#/$defs" not in text


def test_every_parameter_that_is_described_is_taken(root: Requests) -> None:
    """No route refuses a parameter that it has as unknown, or takes one that it has not."""
    for (method, path), route in ROUTES.items():
        if method == "GET" and "{" not in path and path.startswith("/v1"):
            for name in route.parameters:
                answer = root(method, path, params={name: ""})
                if answer.status_code == 400:
                    assert answer.json["code"] != "parameter-unknown", (path, name)
            refused = root(method, path, params={"colour": "red"})
            assert refused.json["code"] == "parameter-unknown", path
