"""The configuration: where it comes from, what wins, what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stratocache.cache.configuration import Configuration, load
from stratocache.cache.errors import InvalidInput

WHOLE = """
state_dir = "/srv/stratocache"
run_dir = "/run/sc"
default_catalogue = "local"
log_level = "debug"

[catalogues.local]
endpoint = "http://127.0.0.1:8080"
legacy_sha1 = "allow-pinned"
trusted_fingerprints = ["aa:bb"]

[fetch]
attempts = 2

[iscsi]
address = "127.0.0.2"
port = 4000

[api]
workers = 1

[space]
reserve_bytes = 0
"""


def written(tmp_path: Path, text: str) -> Path:
    """Write a configuration file."""
    path = tmp_path / "stratocache.toml"
    path.write_text(text)
    return path


def refused(
    path: Path | None, environment: dict[str, str] | None = None, flags: Any = None
) -> InvalidInput:
    """Return the error of a configuration that is refused."""
    with pytest.raises(InvalidInput) as caught:
        load(path, environment=environment or {}, flags=flags)
    return caught.value


def test_file_is_read(tmp_path: Path) -> None:
    """Every table of the file arrives; what it leaves out has a default."""
    configuration = load(written(tmp_path, WHOLE), environment={})

    assert configuration.state_dir == Path("/srv/stratocache")
    assert configuration.catalogues["local"].legacy_sha1 == "allow-pinned"
    assert configuration.catalogues["local"].kind == "stratuslab"
    assert configuration.fetch.attempts == 2
    assert configuration.fetch.max_parallel == 4
    assert configuration.iscsi.address == "127.0.0.2"
    assert configuration.space.reserve_bytes == 0


def test_paths_follow_from_the_directories(tmp_path: Path) -> None:
    """Database, sockets and mount have their place below the two directories."""
    configuration = load(written(tmp_path, WHOLE), environment={})

    assert configuration.database == Path("/srv/stratocache/state.db")
    assert configuration.api_socket == Path("/run/sc/api.sock")
    assert configuration.poke_socket == Path("/run/sc/poke.sock")
    assert configuration.blocks == Path("/run/sc/blocks")


def test_variables_win_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    """File, then variables, then flags; a flag that is None says nothing."""
    path = written(tmp_path, WHOLE)
    environment = {"STRATOCACHE_ISCSI__PORT": "5000", "STRATOCACHE_LOG_LEVEL": "warning"}

    assert load(path, environment={}).iscsi.port == 4000
    assert load(path, environment=environment).iscsi.port == 5000
    flags = {"iscsi.port": 6000, "log_level": None, "state_dir": Path("/x")}
    configuration = load(path, environment=environment, flags=flags)
    assert configuration.iscsi.port == 6000
    assert configuration.iscsi.address == "127.0.0.2"
    assert configuration.log_level == "warning"
    assert configuration.state_dir == Path("/x")


def test_variable_names_the_file(tmp_path: Path) -> None:
    """STRATOCACHE_CONFIG names the file unless one is given, and must exist."""
    path = written(tmp_path, WHOLE)
    environment = {"STRATOCACHE_CONFIG": str(path), "UNRELATED": "x"}

    assert load(environment=environment).iscsi.port == 4000
    other = tmp_path / "other.toml"
    other.write_text("")
    assert load(other, environment=environment).iscsi.port == 3260
    missing = {"STRATOCACHE_CONFIG": str(tmp_path / "no.toml")}
    assert refused(None, missing).code == "configuration-missing"


def test_catalogue_can_come_from_variables(tmp_path: Path) -> None:
    """A table of the file's tables can be made by variables alone."""
    environment = {"STRATOCACHE_CATALOGUES__LOCAL__ENDPOINT": "file:///srv/entries"}

    configuration = load(written(tmp_path, ""), environment=environment)
    assert configuration.catalogues["local"].endpoint == "file:///srv/entries"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("colour = 'red'", "colour"),
        ("[iscsi]\ncolour = 'red'", "iscsi.colour"),
        ("[iscsi]\nbackend = 'scst'", "iscsi.backend"),
        ("[catalogues.a]\nendpoint = 'x'\ncolour = 'red'", "catalogues.a.colour"),
    ],
)
def test_unknown_key_of_the_file_is_refused_by_name(tmp_path: Path, text: str, key: str) -> None:
    """A key that does not exist is an error that names it and the file."""
    path = written(tmp_path, text)
    error = refused(path)

    assert error.code == "configuration-invalid"
    assert error.field == key
    assert key in error.message
    assert str(path) in error.message


def test_unknown_variables_and_flags_are_refused_by_name(tmp_path: Path) -> None:
    """So are variables with our prefix, and flags."""
    path = written(tmp_path, "")

    assert refused(path, {"STRATOCACHE_COLOUR": "red"}).field == "colour"
    assert refused(path, {"STRATOCACHE_ISCSI__COLOUR": "red"}).field == "iscsi.colour"
    assert refused(path, flags={"api.colour": "red"}).field == "api.colour"
    assert refused(path, {"STRATOCACHE_LOG_LEVEL__X": "y"}).code == "configuration-invalid"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iscsi.port", 0),
        ("iscsi.port", 65536),
        ("iscsi.port", "many"),
        ("log_level", "loud"),
        ("fetch.attempts", 0),
        ("fetch.attempts", 101),
        ("fetch.read_timeout_s", 0),
        ("fetch.read_timeout_s", "nan"),
        ("fetch.max_image_bytes", 0),
        ("fetch.max_parallel", 65),
        ("api.workers", 33),
        ("api.threads", 129),
        ("space.reserve_bytes", -1),
        ("peers.hosts", ["a.example.org:0"]),
        ("peers.hosts", ["a.example.org:65536"]),
        ("peers.hosts", ["https://a.example.org"]),
        ("peers.hosts", ["2001:db8::7"]),
        ("peers.timeout_s", 9),
        ("catalogues.Upper.endpoint", "x"),
        ("catalogues.a.kind", "oci"),
        ("catalogues.a.legacy_sha1", "always"),
    ],
)
def test_value_out_of_range_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """Every value has its range, and the key is named."""
    flags = {"catalogues.a.endpoint": "x"} if key.startswith("catalogues.a.") else {}
    error = refused(written(tmp_path, ""), flags={**flags, key: value})

    assert error.code == "configuration-invalid"
    assert error.field is not None
    assert error.field.startswith(key.rpartition(".")[0])


@pytest.mark.parametrize("content", [b"= nonsense", b"\xff\xfe", b"a = 1\na = 2"])
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """What is not TOML in UTF-8 is an error that names the file."""
    path = tmp_path / "stratocache.toml"
    path.write_bytes(content)
    error = refused(path)

    assert error.code == "configuration-unreadable"
    assert str(path) in error.message


def test_directory_or_nothing_is_refused(tmp_path: Path) -> None:
    """A directory cannot be read; a file that was named must exist."""
    assert refused(tmp_path).code == "configuration-unreadable"
    assert refused(tmp_path / "no.toml").code == "configuration-missing"


def test_configuration_is_frozen_and_survives_json(tmp_path: Path) -> None:
    """Nothing changes it afterwards, and its JSON is the same configuration."""
    configuration = load(written(tmp_path, WHOLE), environment={})

    with pytest.raises(ValidationError):
        configuration.log_level = "error"
    assert Configuration.model_validate_json(configuration.model_dump_json()) == configuration


def test_endorsers_are_addresses_or_fingerprints(tmp_path: Path) -> None:
    """A name that can be no endorser's is refused, so that a slip does not leave a rule unused."""
    text = '[catalogues.c]\nendpoint = "http://h"\n[catalogues.c.endorsers."{}"]\nprovisional = "allow"\n'
    found = load(written(tmp_path, text.format("a@example.org")), environment={})
    assert found.catalogues["c"].endorsers["a@example.org"].provisional == "allow"
    assert refused(written(tmp_path, text.format("jane"))).code == "configuration-invalid"
