"""Fixtures of the API's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_daemon import Api, Requests, configured, serving

from stratocache.cache.configuration import Configuration


@pytest.fixture
def configuration(tmp_path: Path) -> Iterator[Configuration]:
    """A configuration with directories of its own; the run directory's path is short."""
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    with configured(state_dir) as made:
        yield made


@pytest.fixture
def api(configuration: Configuration) -> Iterator[Api]:
    """The application on an empty state database."""
    made = Api(configuration)
    yield made
    made.db.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A real API process for all tests of a module, and the application on its database."""
    with configured(tmp_path_factory.mktemp("state")) as made:
        shared = Api(made)
        with serving(made):
            yield shared
        shared.db.close()


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
