"""`/v1/cache` and its commands: where the space has gone, and what keeps each image."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.api_daemon import IMAGE_ID, Api, Requests, insert_disk, insert_image, problem, serving

from stratocache.api import cache_commands
from stratocache.api.command_line import command_line
from stratocache.cache import configuration as configuration_module
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import InvalidInput

MIB = 1024**2


def test_account_is_shown_to_everybody(api: Api, root: Requests, nobody: Requests) -> None:
    """Sums are no secret: every user reads the same account."""
    insert_disk(api.db, size_bytes=5 * MIB)
    answer = root("GET", "/v1/cache")
    assert answer.status_code == 200
    account = answer.json
    assert account["promised_bytes"] == account["disk_size_bytes"] == 5 * MIB
    assert account["overcommit_ratio"] == 10
    assert account["promise_limit_bytes"] == 10 * account["available_bytes"]
    assert account["reserve_bytes"] == 1024**3
    assert account["chunk_bytes"] == 0
    assert nobody("GET", "/v1/cache").json.keys() == account.keys()
    problem(root("GET", "/v1/cache?colour=red"), 400, "parameter-unknown", "colour")
    assert root("POST", "/v1/cache", {}).status_code == 405


def test_plan_names_what_keeps_an_image(api: Api, root: Requests, nobody: Requests) -> None:
    """The plan lists images with their holders; others' disks and instances are only counted."""
    insert_image(api.db)
    uuid = insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET base_image = ?, form = 'overlay'", (IMAGE_ID,))
    plan = root("GET", "/v1/cache/plan").json
    assert plan["space"]["disk_size_bytes"] == 2**20
    (image,) = plan["images"]
    assert image["image"] == IMAGE_ID
    assert image["title"] == "a small system"
    assert (image["held"], image["pinned"]) == (True, False)
    assert (image["disk_count"], image["disks"]) == (1, [uuid])
    assert (image["instance_count"], image["instances"]) == (0, [])
    (seen,) = nobody("GET", "/v1/cache/plan").json["images"]
    assert (seen["disk_count"], seen["disks"], seen["instances"]) == (1, [], [])


def test_commands_show_sizes_and_holders(configuration: Configuration) -> None:
    """`cache status` and `cache plan` write lines for people, or the API's JSON."""
    api = Api(configuration)
    insert_image(api.db)
    insert_disk(api.db, size_bytes=5 * MIB)
    api.db.connection.execute("UPDATE disks SET base_image = ?, form = 'overlay'", (IMAGE_ID,))
    api.db.connection.execute("UPDATE images SET pinned = 1")
    api.db.close()

    def run(*arguments: str) -> str:
        socket = ["--socket", str(configuration.api_socket)]
        result = CliRunner().invoke(command_line, [*socket, *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    with serving(configuration):
        status = run("cache", "status")
        assert "promised to disks:   5 MiB\n" in status
        account = json.loads(run("cache", "status", "--json"))
        assert account["promised_bytes"] == 5 * MIB
        plan = run("cache", "plan")
        assert plan.startswith(status)
        header, line = plan.splitlines()[-2:]
        assert header.split("\t") == ["IMAGE", "SIZE", "LAST USED", "KEPT BY", "TITLE"]
        assert line.split("\t") == [IMAGE_ID, "4 MiB", "-", "pin, 1 disks", "a small system"]
        assert json.loads(run("cache", "plan", "--json"))["images"][0]["pinned"] is True
    assert cache_commands.promise_line(account).startswith(
        "Disks are promised 5 MiB more than they have; "
    )


@pytest.mark.parametrize("ratio", ["0.5", "0", "-1", "1001", "much", "nan"])
def test_ratio_that_cannot_be_is_refused(tmp_path: Path, ratio: str) -> None:
    """The overcommit ratio is a number from 1 to 1000."""
    with pytest.raises(InvalidInput) as caught:
        configuration_module.load(None, environment={"STRATOCACHE_SPACE__OVERCOMMIT_RATIO": ratio})
    assert caught.value.field == "space.overcommit_ratio"
