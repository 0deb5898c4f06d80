"""The identifier arithmetic, against published entries."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratocache.cache import identifier
from stratocache.cache.errors import InvalidInput

VECTORS = [
    ("c319bbd5afc0a22ba3eaed0507c39383ec28eeff", "MMZu9WvwKIro-rtBQfDk4PsKO7_"),
    ("972a1a11f19934401291cc99117ec614933374ce", "JcqGhHxmTRAEpHMmRF-xhSTM3TO"),
    ("aa94ff51191551820c4857f4aa2cf5c90e68d8c1", "KqU_1EZFVGCDEhX9Kos9ckOaNjB"),
    ("b1df2953e81dcbf8a0c8ab1d4d0ab8e41cf93bc8", "LHfKVPoHcv4oMirHU0KuOQc-TvI"),
    ("1b5229d5dad92bc7952553be01608af2180eafbe", "BtSKdXa2SvHlSVTvgFgivIYDq--"),
    ("f203b7de324a32841ca2af5ab6228ec66d725c54", "PIDt94ySjKEHKKvWrYijsZtclxU"),
    ("c1388914de98747084004a579020ae441f0deac0", "ME4iRTemHRwhABKV5AgrkQfDerA"),
    ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "No5o-5ea0sNMlW_75VgGJCv2AcJ"),
    ("0" * 40, "A" * 27),
    ("f" * 40, "P" + "_" * 26),
]


@pytest.mark.parametrize(("sha1", "name"), VECTORS)
def test_vector(sha1: str, name: str) -> None:
    """Every published identifier is its SHA-1, both ways."""
    assert identifier.encode(sha1) == name
    assert identifier.encode(sha1.upper()) == name
    assert identifier.decode(name) == sha1
    assert identifier.is_identifier(name)


@given(st.binary(min_size=20, max_size=20))
def test_round_trip(digest: bytes) -> None:
    """Decoding gives back what was encoded, and the value is that of two bits before base64url."""
    name = identifier.encode(digest.hex())

    assert identifier.decode(name) == digest.hex()
    assert identifier.is_identifier(name)
    padded = base64.urlsafe_b64encode(b"\0" + (int.from_bytes(digest, "big")).to_bytes(20, "big"))
    assert padded.decode()[1:28] == name


@pytest.mark.parametrize(
    "text",
    [
        "", "A" * 26, "A" * 28, "Q" + "A" * 26, "_" * 27, "A" * 26 + "=", "A" * 26 + "/",
        "A" * 26 + "\n", "À" + "A" * 26, " " + "A" * 26,
    ],
)  # fmt: skip
def test_wrong_identifier(text: str) -> None:
    """Wrong lengths, characters and values above 160 bits are refused."""
    assert not identifier.is_identifier(text)
    with pytest.raises(InvalidInput) as caught:
        identifier.decode(text)
    assert caught.value.code == "identifier-invalid"


@pytest.mark.parametrize("text", ["", "0" * 39, "0" * 41, "g" * 40, "0x" + "0" * 38, "\u0660" * 40])
def test_wrong_sha1(text: str) -> None:
    """Only 40 hexadecimal digits are a SHA-1."""
    with pytest.raises(InvalidInput) as caught:
        identifier.encode(text)
    assert caught.value.code == "sha1-invalid"
