"""What is logged, in both forms."""

import json
import logging
import subprocess
import sys
from contextvars import copy_context

import pytest

from stratocache.cache.structured_log import ON_BEHALF, OnBehalf, configure_log, on_behalf_of

PROGRAM = """
import logging, sys
from stratocache.cache.structured_log import configure_log, on_behalf_of
configure_log("blockd", "info", sys.argv[1])
log = logging.getLogger("a.b")
log.info("nobody asked")
log.debug("too quiet")
with on_behalf_of(request_id="r1"), on_behalf_of(operation_id="o1"):
    log.warning("for %s", "vm\\n2026-01-01 api INFO forged\\u2028\\x1b[31m")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("it failed", extra={"facts": {"status": 500}})
logging.getLogger("httpx").info("HTTP Request: GET http://a/?token=x")
"""


def _logged(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form], check=True, capture_output=True, text=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_an_object_on_each_line() -> None:
    """Each record is one JSON object with its ids, its facts and its traceback."""
    lines = [json.loads(line) for line in _logged("json")]

    assert [line["message"].split("\n")[0] for line in lines] == [
        "nobody asked",
        "for vm",
        "it failed",
    ]
    assert lines[0].keys() == {"time", "level", "process", "pid", "logger", "message"}
    assert lines[0]["time"].endswith("Z")
    assert (lines[1]["request_id"], lines[1]["operation_id"]) == ("r1", "o1")
    assert (lines[1]["level"], lines[1]["process"], lines[1]["logger"]) == (
        "warning",
        "blockd",
        "a.b",
    )
    assert lines[2]["status"] == 500
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_text_cannot_be_forged() -> None:
    """A name with line breaks or escapes stays within its line of text."""
    lines = _logged("text")

    assert lines[0].endswith("blockd INFO a.b: nobody asked")
    assert lines[1].endswith(
        r"\n2026-01-01 api INFO forged\x2028\x1b[31m [request_id=r1 operation_id=o1]"
    )
    assert lines[2].endswith("it failed [request_id=r1 operation_id=o1]")
    assert lines[3].startswith("Traceback")


def test_ids_end_with_their_block() -> None:
    """What follows a block is not attributed to it."""

    def check() -> None:
        before = ON_BEHALF.get()
        with on_behalf_of(operation_id="o1"):
            assert ON_BEHALF.get() == OnBehalf(before.request_id, "o1")
        assert ON_BEHALF.get() == before

    copy_context().run(check)


def test_configuring_again_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The last configuration counts; no line is written twice."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_log("api", "info", "text")
        configure_log("api", "warning", "json")
        logging.getLogger("x").warning("once")
        logging.getLogger("x").info("never")
    finally:
        root.handlers[:] = before
        root.setLevel(level)

    assert json.loads(capsys.readouterr().err)["message"] == "once"
