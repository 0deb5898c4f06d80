"""The errors users meet."""

import pytest

from stratocache.cache import errors
from stratocache.cache.errors import ErrorRecord, StratocacheError, from_record

CATEGORIES = [
    (errors.InvalidInput, 2, 400),
    (errors.NotFound, 3, 404),
    (errors.Conflict, 4, 409),
    (errors.Refused, 5, 403),
    (errors.NotVerified, 6, 422),
    (errors.NoSpace, 7, 507),
    (errors.OriginFailed, 1, 502),
    (errors.Cancelled, 1, 409),
    (errors.Unreachable, 10, 503),
    (errors.Internal, 1, 500),
]


def test_every_category_is_tested() -> None:
    """The table above names each subclass once."""
    assert {category for category, *_ in CATEGORIES} == set(StratocacheError.__subclasses__())


@pytest.mark.parametrize(("category", "exit_status", "http_status"), CATEGORIES)
def test_statuses_are_the_documented_ones(
    category: type[StratocacheError], exit_status: int, http_status: int
) -> None:
    """Exit and HTTP statuses are part of the contract."""
    assert category.exit_status == exit_status
    assert category.http_status == http_status


@pytest.mark.parametrize("field", [None, "size_bytes"])
@pytest.mark.parametrize("category", [category for category, *_ in CATEGORIES])
def test_error_survives_its_record(category: type[StratocacheError], field: str | None) -> None:
    """An error read from its record is the same error."""
    error = from_record(category("some-code", "Do this.", field=field).to_record())

    assert type(error) is category
    assert (error.code, error.message, error.field) == ("some-code", "Do this.", field)
    assert str(error) == "Do this."


def test_record_without_a_field_has_no_such_key() -> None:
    """Only an error that blames a field names one."""
    assert "field" not in errors.NotFound("image-unknown", "No.").to_record()


@pytest.mark.parametrize("record", [{}, {"category": "Nonsense"}, {"category": "Exception"}])
def test_unknown_category_is_internal(record: ErrorRecord) -> None:
    """A record of another version is still an error."""
    error = from_record(record)

    assert type(error) is errors.Internal
    assert error.code == "internal"
