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
    assert (account["cache_limit_bytes"], account["losses"]) == (0, [])
    assert account["scrub"]["state"] == "idle"


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
        assert status.startswith(plan.partition("\n\n")[0])
        assert "scrubber:            idle; 0 chunks" in status
        header, line = plan.splitlines()[-2:]
        assert header.split("\t") == [
            "#", "IMAGE", "STATE", "SIZE", "LAST USED", "FREES", "BOOT SET",
            "REFETCH", "KEPT BY", "TITLE",
        ]  # fmt: skip
        assert line.split("\t") == [
            "-", IMAGE_ID, "verified", "4 MiB", "-", "0 B", "-", "4 MiB from 127.0.0.1", "pinned",
            "a small system",
        ]  # fmt: skip
        assert json.loads(run("cache", "plan", "--json"))["images"][0]["pinned"] is True
    assert cache_commands.promise_line(account).startswith(
        "Disks are promised 5 MiB more than they have; "
    )


def test_plan_says_why_and_at_what_cost(api: Api, root: Requests, nobody: Requests) -> None:
    """An image that may go has its turn and its cost; names of holders are for administrators."""
    insert_image(api.db)
    (image,) = root("GET", "/v1/cache/plan").json["images"]
    assert image["kept_because"] is None or image["kept_because"].startswith("nothing to gain")
    assert (image["refetch_bytes"], image["origin"]) == (4 * MIB, "127.0.0.1")
    uuid = insert_disk(api.db)
    api.db.connection.execute("UPDATE disks SET base_image = ?, form = 'overlay'", (IMAGE_ID,))
    (image,) = root("GET", "/v1/cache/plan").json["images"]
    assert (image["order"], image["kept_because"]) == (None, f"base of disk {uuid}")
    (seen,) = nobody("GET", "/v1/cache/plan").json["images"]
    assert seen["kept_because"] == "in use"


def test_offline_plan_names_what_is_not_whole(api: Api, root: Requests) -> None:
    """An image that is needed and has no files would fail; one that nothing needs is no matter."""
    insert_image(api.db)
    assert root("GET", "/v1/cache/plan?offline=true").json == {"images": []}
    root("PUT", f"/v1/images/{IMAGE_ID}/pin")
    (image,) = root("GET", "/v1/cache/plan?offline=true").json["images"]
    assert (image["image"], image["pinned"]) == (IMAGE_ID, True)
    assert image["reason"] == "its manifest is damaged or gone"


def test_evictions_are_asked_for_and_previewed(api: Api, root: Requests, nobody: Requests) -> None:
    """What is held is refused with its holder; a dry run records nothing."""
    insert_image(api.db)
    root("PUT", f"/v1/images/{IMAGE_ID}/pin")
    answer = root("POST", "/v1/cache/evict", {"image": IMAGE_ID})
    assert "pinned" in problem(answer, 409, "image-held")["detail"]
    problem(root("POST", "/v1/cache/evict", {"image": "A" * 27}), 404, "image-unknown")
    problem(root("POST", "/v1/cache/evict", {"bytes": -1}), 400, "field-invalid", "bytes")
    both = {"image": IMAGE_ID, "bytes": 1}
    problem(root("POST", "/v1/cache/evict", both), 400, "eviction-ambiguous")
    problem(nobody("POST", "/v1/cache/evict", {}), 403, "not-allowed")
    preview = root("POST", "/v1/cache/evict", {"bytes": 10, "dry_run": True})
    assert preview.json == {"images": [], "freed_bytes": 0}
    assert api.db.rows("SELECT 1 FROM operations WHERE kind = 'evict'") == []
    asked = root("POST", "/v1/cache/evict", {})
    assert asked.status_code == 202
    assert (asked.json["kind"], asked.json["subject"]) == ("evict", "cache")


def test_scrubber_is_paused_and_resumed(api: Api, root: Requests, nobody: Requests) -> None:
    """Each request answers with what the scrubber is to do; twice is no error."""
    for action, state in (
        ("now", "running"), ("pause", "paused"), ("pause", "paused"), ("resume", "running"),
    ):  # fmt: skip
        answer = root("POST", "/v1/cache/scrub", {"action": action})
        assert (answer.status_code, answer.json["state"]) == (200, state)
    problem(root("POST", "/v1/cache/scrub", {"action": "x"}), 400, "field-invalid", "action")
    problem(nobody("POST", "/v1/cache/scrub", {}), 403, "not-allowed")


def test_verification_is_one_operation(api: Api, root: Requests) -> None:
    """An image that is being verified is not verified twice at once."""
    insert_image(api.db)
    first = root("POST", f"/v1/images/{IMAGE_ID}/verify", {})
    again = root("POST", f"/v1/images/{IMAGE_ID}/verify", {})
    assert first.status_code == again.status_code == 202
    assert first.json["id"] == again.json["id"]
    problem(root("POST", f"/v1/images/{'A' * 27}/verify", {}), 404, "image-unknown")


@pytest.mark.parametrize("ratio", ["0.5", "0", "-1", "1001", "much", "nan"])
def test_ratio_that_cannot_be_is_refused(tmp_path: Path, ratio: str) -> None:
    """The overcommit ratio is a number from 1 to 1000."""
    with pytest.raises(InvalidInput) as caught:
        configuration_module.load(None, environment={"STRATOCACHE_SPACE__OVERCOMMIT_RATIO": ratio})
    assert caught.value.field == "space.overcommit_ratio"
