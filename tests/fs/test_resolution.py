"""What a reference stands for, asked of a real catalogue folder and answered before any fetch."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.operation_host import IDENTIFIER, IMAGE, NOW, ROOT_CALLER, Host, operation_host

from stratocache.fs import image_intents, inventory
from stratocache.fs.operations import Operations
from stratocache.fs.resolution import Resolution, request_resolution


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    with operation_host(tmp_path) as host:
        yield host


def resolve(host: Host, reference: str = IDENTIFIER) -> dict[str, Any]:
    """Ask what a reference stands for; return the result of the operation, which is done."""
    operation = request_resolution(host.db, ROOT_CALLER, reference)

    async def script(operations: Operations) -> None:
        assert host.acquisition is not None
        assert host.catalogues is not None
        performer = Resolution(host.db, host.acquisition, host.catalogues)
        await performer.perform(operation, lambda done_bytes, total_bytes: None)

    host.run(script)
    ended = inventory.operation(host.db, operation.id)
    assert ended.state == "done"
    assert ended.result is not None
    return ended.result


def test_accepted_reference_shows_the_entry_and_fetches_nothing(host: Host) -> None:
    """The result has the entry that would be fetched and why it is trusted; the origin hears nothing."""
    host.publish()

    result = resolve(host)

    assert result["accepted"] is True
    assert result["code"] is None
    assert result["entry"]["identifier"] == IDENTIFIER
    assert result["entry"]["endorser"]["email"] in result["message"]
    assert "signature verifies" in result["message"]
    assert [item["code"] for item in result["candidates"]] == [None]
    assert result["cached"] is None
    assert host.origin.log == []
    assert inventory.images(host.db) == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"valid_until": NOW - timedelta(hours=1)}, "entry-expired"),
        ({"deprecated": "hole in it"}, "entry-deprecated"),
        ({"algorithms": ["SHA-1"]}, "digest-too-weak"),
    ],
)
def test_refused_reference_says_why(host: Host, fields: dict[str, Any], code: str) -> None:
    """What would be refused at the fetch is the result here, with each document's fault."""
    host.publish(**fields)

    result = resolve(host)

    assert result["accepted"] is False
    assert result["code"] == code
    assert result["entry"] is None
    [candidate] = result["candidates"]
    assert candidate["code"] == code
    assert candidate["message"] == result["message"]
    assert candidate["endorsed_at"].endswith("Z")


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (IDENTIFIER, "reference-unknown"),
        ("local:" + IDENTIFIER, "image-unknown"),
        ("nowhere:" + IDENTIFIER, "catalogue-unknown"),
        ("not-an-identifier", "reference-invalid"),
    ],
    ids=["unknown", "not-here", "no-catalogue", "no-identifier"],
)
def test_unusable_reference_is_a_result(host: Host, reference: str, code: str) -> None:
    """A reference that names nothing, or is none, gives its error as the result."""
    result = resolve(host, reference)

    assert (result["accepted"], result["code"], result["cached"]) == (False, code, None)


def test_cached_image_is_judged_by_what_is_stored(host: Host) -> None:
    """An image that is here is told as such, with its catalogue gone, and refused when distrusted."""
    host.publish()
    fetch = image_intents.request_fetch(host.db, ROOT_CALLER, IDENTIFIER)

    async def script(operations: Operations) -> None:
        assert (await host.end(fetch)).state == "done"

    host.run(script)
    (host.folder / "entries").rename(host.folder / "away")
    known = resolve(host)
    trusting = host.configuration.catalogues["stratuslab"]
    distrusting = trusting.model_copy(update={"trusted_fingerprints": ("00" * 32,)})
    host.configuration = host.configuration.model_copy(
        update={"catalogues": {"stratuslab": distrusting}}
    )
    refused = resolve(host)

    assert (known["accepted"], known["cached"]) == (True, "verified")
    assert known["entry"]["size_bytes"] == len(IMAGE)
    assert (refused["accepted"], refused["code"]) == (False, "endorser-untrusted")
    assert refused["cached"] == "verified"
