"""Ids of requests, on the real server and from there to a fetch of a whole appliance."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_daemon import Api, serving
from support.appliance import Appliance
from support.publishing import publish_image

from stratocache.api.request_log import HEADER
from stratocache.cache.configuration import Configuration, LogSettings

pytestmark = pytest.mark.root

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _ask(socket: Path, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://x", timeout=60) as client:
        return client.request(method, path, json=body, headers=headers)


def test_every_request_has_an_id(
    configuration: Configuration, api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    """A client's id comes back and is in the log, one that is none is replaced; neither queries nor
    bodies are logged, and gunicorn's own lines have the same form."""
    spoken = configuration.model_copy(
        update={"log_level": "debug", "log": LogSettings(format="json")}
    )
    with serving(spoken):
        path = spoken.api_socket
        mine = _ask(path, "GET", "/v1?password=hidden", **{HEADER: "launcher-7/a"})
        forged = _ask(path, "GET", "/v1", **{HEADER: 'x" "level": "none'})
        wrong = _ask(path, "POST", "/v1/disks", {"hidden": 1})
        missing = _ask(path, "GET", "/v1/nothing%0aforged")

    assert mine.headers[HEADER] == "launcher-7/a"
    ids = [answer.headers[HEADER] for answer in (forged, wrong, missing)]
    assert all(_UUID.fullmatch(each) for each in ids)
    assert len(set(ids)) == 3
    text = capfd.readouterr().err
    assert "hidden" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["process"] for line in lines} == {"api"}
    assert "gunicorn.error" in {line["logger"] for line in lines}
    requests = {line["request_id"]: line for line in lines if "status" in line}
    assert requests["launcher-7/a"]["route"] == "/v1"
    assert requests["launcher-7/a"]["caller"] == "root"
    assert [requests[each]["status"] for each in ids] == [200, 400, 404]
    assert [requests[each]["level"] for each in ids] == ["debug", "info", "debug"]


@pytest.mark.slow
def test_a_fetch_is_attributed_to_its_request(tmp_path: Path) -> None:
    """What `blockd` logs of a fetch has the ids of the operation and of the request behind it; what
    nobody asked for has none."""
    published = publish_image(tmp_path / "published", 1024**2)
    with Appliance(
        tmp_path / "appliance", endpoint=published.endpoint, fingerprint=published.fingerprint,
        extra='log.format = "json"',
    ) as appliance:  # fmt: skip
        answer = _ask(
            appliance.run_dir / "api.sock", "POST", "/v1/images?wait=60",
            {"reference": published.identifier}, **{HEADER: "launcher-8"},
        )  # fmt: skip
        assert answer.status_code == 201, answer.text
        operations = appliance.request("GET", "/v1/operations")[1]["operations"]
    lines = [json.loads(line) for line in appliance.log.read_text().splitlines() if line[0] == "{"]

    blockd = [line for line in lines if line["process"] == "blockd"]
    fetched = [line for line in blockd if line["logger"] == "stratocache.cache.fetch"]
    assert fetched
    assert {(line["request_id"], line["operation_id"]) for line in fetched} == {
        ("launcher-8", operations[0]["id"])
    }
    assert any("request_id" not in line for line in blockd)
    assert {line["process"] for line in lines} >= {"supervisor", "blockd", "api"}
