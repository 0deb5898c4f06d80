"""Fixtures of the API's tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_daemon import Api, Requests

from stratocache.cache.configuration import ApiSettings, Configuration, IscsiSettings


@pytest.fixture
def configuration(tmp_path: Path) -> Iterator[Configuration]:
    """A configuration with directories of its own; the run directory's path is short."""
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    with tempfile.TemporaryDirectory(prefix="sc-") as run_dir:
        yield Configuration(
            state_dir=state_dir,
            run_dir=Path(run_dir),
            iscsi=IscsiSettings(port=1),
            api=ApiSettings(workers=1, threads=6, group="no-such-group"),
        )


@pytest.fixture
def api(configuration: Configuration) -> Iterator[Api]:
    """The application on an empty state database."""
    made = Api(configuration)
    yield made
    made.db.close()


@pytest.fixture
def root(api: Api) -> Iterator[Requests]:
    """Requests by root."""
    with api.caller() as requests:
        yield requests


@pytest.fixture
def nobody(api: Api) -> Iterator[Requests]:
    """Requests by an ordinary user."""
    with api.caller(65534) as requests:
        yield requests
