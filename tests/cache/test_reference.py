"""What users may type to name an image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratocache.cache import reference
from stratocache.cache.errors import InvalidInput, NotFound, StratocacheError
from stratocache.cache.reference import Reference

ID = "KqU_1EZFVGCDEhX9Kos9ckOaNjB"
ENDPOINTS = {
    "stratuslab": "https://marketplace.example.org/marketplace",
    "local": "file:///srv/entries",
    "other-2": "http://127.0.0.1:8081/",
}
SHA256 = "0123456789abcdef" * 4


def parse(text: str) -> Reference:
    return reference.parse(text, "stratuslab", ENDPOINTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ID, Reference("stratuslab", ID)),
        (f"stratuslab:{ID}", Reference("stratuslab", ID)),
        (f"other-2:{ID}/", Reference("other-2", ID)),
        (f"{ID}@sha256:{SHA256}", Reference("stratuslab", ID, ("sha256", SHA256))),
        (f"local:{ID}@SHA256:{SHA256.upper()}", Reference("local", ID, ("sha256", SHA256))),
        (f"{ID}@md5:{'0' * 32}", Reference("stratuslab", ID, ("md5", "0" * 32))),
        (f"{ID}/jane@example.org", Reference("stratuslab", f"{ID}/jane@example.org")),
        (f"{ID}/jane%40example.org", Reference("stratuslab", f"{ID}/jane@example.org")),
        (
            f"{ID}/jane@example.org/2014-03-08T14:10:17Z",
            Reference("stratuslab", f"{ID}/jane@example.org/2014-03-08T14:10:17Z"),
        ),
        (
            f"local:{ID}/jane@example.org/2014-03-08T14:10:17Z@sha1:{'a' * 40}",
            Reference(
                "local", f"{ID}/jane@example.org/2014-03-08T14:10:17Z", ("sha1", "a" * 40)
            ),
        ),
        (
            f"https://marketplace.example.org/marketplace/metadata/{ID}/j@e.org/2014-03-08T14:10:17Z",
            Reference("stratuslab", f"{ID}/j@e.org/2014-03-08T14:10:17Z"),
        ),
        (f"http://127.0.0.1:8081/metadata/{ID}", Reference("other-2", ID)),
        (
            f"file:///srv/entries/{ID}/j@e.org/2014-03-08T14:10:17Z.xml",
            Reference("local", f"{ID}/j@e.org/2014-03-08T14:10:17Z"),
        ),
    ],
)  # fmt: skip
def test_accepted(text: str, expected: Reference) -> None:
    """Each documented form gives its catalogue, path and pin."""
    assert parse(text) == expected
    assert reference.parse(str(expected), "other-2", ENDPOINTS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "stratuslab:", "/", f"//{ID}", f"{ID}//x", f"{ID}/../etc", f"{ID}/./x",
        f"{ID} ", f"{ID}\n", f"{ID}\0", f"{ID}?x=1", f"{ID}#x", f"{ID}/%2e%2e/x", f"{ID}/a%2Fb%00",
        f"{ID}@sha256:{SHA256[:-1]}", f"{ID}@sha256:xyz", f"{ID}@sha256:", f"{ID}@md5:{SHA256}",
        "A" * 1025, f"https://marketplace.example.org/marketplace/metadata/{ID}?media=json",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    """Malformed references are refused with one code."""
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert caught.value.code == "reference-invalid"
    assert caught.value.field == "reference"


@pytest.mark.parametrize(
    "text",
    [f"nowhere:{ID}", f"https://elsewhere.example.org/metadata/{ID}", f"sha256:{SHA256}",
     f"https://marketplace.example.org/other/metadata/{ID}", "file:///etc/shadow"],
)  # fmt: skip
def test_unknown_catalogue(text: str) -> None:
    """A catalogue or URL that is not configured is named."""
    with pytest.raises(NotFound) as caught:
        parse(text)
    assert caught.value.code == "catalogue-unknown"


def test_default_catalogue_must_exist() -> None:
    """A bare identifier needs the default catalogue to be configured."""
    with pytest.raises(NotFound) as caught:
        reference.parse(ID, "stratuslab", {})
    assert caught.value.code == "catalogue-unknown"


@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    """Whatever is typed gives a reference or one of our errors."""
    try:
        found = parse(text)
    except StratocacheError:
        return
    assert found.catalogue in ENDPOINTS
    assert ".." not in found.path.split("/")
