"""`/metrics`: what it says and to whom, and that names and units follow Prometheus' rules."""

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.api_daemon import (
    IMAGE_ID,
    Api,
    Requests,
    end_badly,
    insert_disk,
    insert_image,
    problem,
    standing_in,
)
from support.exposition import families, samples, value

from stratocache.api import metric_catalogue as catalogue
from stratocache.cache.configuration import Configuration
from stratocache.fs.counts import Counts, read_all, take_slot
from stratocache.fs.schema import MIGRATIONS
from stratocache.fs.state import Database, record_event
from stratocache.fs.tallies import tallies

REPOSITORY = Path(__file__).resolve().parents[2]
_PARTS = re.compile(r"\bstratocache_[a-z0-9_]+")
_SUFFIXES = ("_bucket", "_count", "_sum")


@pytest.fixture
def attached(api: Api, root: Requests) -> Iterator[str]:
    """A disk that an instance has."""
    uuid = insert_disk(api.db)
    with standing_in(api.db):
        answer = root("POST", f"/v1/disks/{uuid}/attachments", {"instance": "vm1"})
        assert answer.status_code == 201, answer.text
    yield uuid


def test_every_metric_is_answered_with_meaning_and_kind(api: Api, root: Requests) -> None:
    """The answer parses, and has each metric of the catalogue with HELP and TYPE, and no other."""
    answer = root("GET", "/metrics")

    found = families(answer.text)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert {name: (item.type, item.documentation) for name, item in found.items()} == {
        metric.full_name: (metric.kind, metric.help) for metric in catalogue.METRICS
    }


def test_names_follow_the_rules(api: Api, root: Requests) -> None:
    """What `promtool check metrics` looks at: prefixes, base units last, `_total`, labels, help."""
    base_units = ("seconds", "bytes", "ratio")
    for metric in catalogue.METRICS:
        name, words = metric.full_name, metric.full_name.split("_")
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name) and "__" not in name, name
        assert (words[-1] == "total") == (metric.kind == "counter"), name
        assert not {"count", "sum", "bucket", "info"} & {words[-1]} or name.endswith("build_info")
        wrong = {
            "ms",
            "milliseconds",
            "microseconds",
            "minutes",
            "kb",
            "mb",
            "gb",
            "percent",
            "kib",
        }
        assert not wrong & set(words), name
        for unit in base_units:
            if unit in words:
                after = words[words.index(unit) + 1 :]
                assert after in ([], ["total"]), name
        assert not set(metric.labels) & {"le", "quantile", "instance", "job"}, name
        assert metric.help and metric.help.endswith("."), name
    text = root("GET", "/metrics").text
    assert text.endswith("\n") and text.count("# HELP") == text.count("# TYPE")


def test_requests_are_counted_by_route_and_end(api: Api, root: Requests) -> None:
    """Addresses make no series of their own; refusals and unknown paths count too."""
    insert_image(api.db)
    uuids = [insert_disk(api.db) for _ in range(3)]
    for uuid in uuids:
        assert root("GET", f"/v1/disks/{uuid}").status_code == 200
    assert root("GET", "/v1/disks/none").status_code == 404
    assert root("GET", "/nowhere").status_code == 404
    assert root("DELETE", "/v1/cache").status_code == 405

    text = root("GET", "/metrics").text

    route = {"method": "GET", "route": "/v1/disks/{uuid}"}
    assert value(text, "http_requests_total", status="200", **route) == 3
    assert value(text, "http_requests_total", status="404", **route) == 1
    assert value(text, "http_request_duration_seconds_count", **route) == 4
    assert 0 < value(text, "http_request_duration_seconds_sum", **route) < 60
    unmatched = {"method": "GET", "route": "unmatched", "status": "404"}
    assert value(text, "http_requests_total", **unmatched) == 1
    assert not any(uuid in text for uuid in uuids)


def test_workers_counts_are_added_up(api: Api, root: Requests) -> None:
    """What another worker, or one that is dead, has written is in the answer of any."""
    directory = api.configuration.run_dir / "counts"
    for name in ("api-7", "api-8"):
        counts = Counts(directory, name)
        counts.add("http_requests", "GET", "/healthz", "200", by=5)
        counts.observe(0.5, "http_duration", "GET", "/healthz")
        counts.write()
    root("GET", "/healthz")

    text = root("GET", "/metrics").text

    labels = {"method": "GET", "route": "/healthz"}
    assert value(text, "http_requests_total", status="200", **labels) == 11
    assert value(text, "http_request_duration_seconds_count", **labels) == 3
    assert value(text, "http_request_duration_seconds_bucket", le="0.3", **labels) == 1
    assert value(text, "http_request_duration_seconds_bucket", le="1.0", **labels) == 3
    assert value(text, "http_request_duration_seconds_bucket", le="+Inf", **labels) == 3


def test_a_new_worker_goes_on_from_the_old_ones_counts(tmp_path: Path) -> None:
    """Counters do not fall when a process is started again; two at a time have two files."""
    names = [take_slot(tmp_path, "api"), take_slot(tmp_path, "api")]
    for _ in range(3):
        process = Counts(tmp_path, names[0])
        process.add("http_requests", "GET", "/healthz", "200")
        process.follow(5, "chunk_verifications")
        process.follow(7, "chunk_verifications")
        process.observe(0.002, "http_duration", "GET", "/healthz")
        process.write()

    found = read_all(tmp_path)

    assert names == ["api-0", "api-1"]
    assert found.counters == {
        ("http_requests", "GET", "/healthz", "200"): 3, ("chunk_verifications",): 21
    }  # fmt: skip
    (durations,) = found.durations.values()
    assert sum(durations.counts) == 3 and durations.sum_s == pytest.approx(0.006)


def test_requests_are_answered_when_nothing_can_be_counted(configuration: Configuration) -> None:
    """A place for counts that cannot be used costs the counts alone, and the log says so."""
    (configuration.run_dir / "counts").write_text("in the way")
    api = Api(configuration)
    with api.caller() as requests:
        assert requests("GET", "/healthz").status_code == 200
        text = requests("GET", "/metrics").text
    api.db.close()

    assert value(text, "part_up", part="state") == 1


def test_counts_that_cannot_be_read_are_begun_anew(api: Api, root: Requests) -> None:
    """A torn, foreign or strange file costs its counts, never the answer."""
    directory = api.configuration.run_dir / "counts"
    for number, content in enumerate(
        (b"", b"{", b"[]", b'{"version": 9}', b"\xff", b'{"version":1}')
    ):
        (directory / f"bad-{number}.json").write_bytes(content)
    (directory / "other.json").write_text(
        '{"version": 1, "counters": [["io_errors", 3], ["unheard_of", "x", 1]], "durations": '
        '[["io_duration", "read", [1, 2], 1.0]]}'
    )

    text = root("GET", "/metrics").text

    assert "unheard_of" not in text
    assert not any(name == "stratocache_block_request_errors_total" for name, _ in samples(text))


def test_rows_become_numbers(api: Api, root: Requests, attached: str) -> None:
    """Images, disks, attachments, losses and tallies are what the state database says."""
    insert_image(api.db)
    api.db.connection.execute("UPDATE images SET pinned = 1")
    api.db.connection.execute(
        "INSERT INTO losses VALUES ('ab', 'chunk', '2026-01-01T00:00:00Z', '[]', 'gone')"
    )
    api.db.connection.execute("INSERT INTO tallies VALUES ('hits', '', 30), ('misses', '', 10)")
    api.db.connection.execute("INSERT INTO tallies VALUES ('requests', 'wrong', 4)")
    with api.db.transaction() as connection:
        for _ in range(3):
            record_event(connection, "image.evicted", IMAGE_ID, "It makes room.")

    text = root("GET", "/metrics").text

    assert value(text, "images", state="verified") == value(text, "images_pinned") == 1
    assert value(text, "attachments", state="ready", access="rw") == 1
    assert value(text, "disks", state="available", form="raw") == 1
    assert value(text, "losses", kind="chunk") == 1
    assert value(text, "cache_hits_total") == 30 and value(text, "cache_misses_total") == 10
    assert value(text, "fetch_requests_total", outcome="wrong") == 4
    assert value(text, "events_total", kind="image.evicted") == 3
    assert value(text, "operations_total", kind="attach", state="done") == 1
    assert value(text, "operation_seconds_total", kind="attach") >= 0
    assert value(text, "disks_size_bytes") == 2**20
    shown = root("GET", "/v1/cache").json
    assert (shown["hits"], shown["misses"], shown["hit_ratio"]) == (30, 10, 0.75)


def test_operations_are_counted_once_however_they_end(api: Api, root: Requests) -> None:
    """Each end counts once, by its kind and state; a second update of the row does not."""
    for state in ("failed", "cancelled", "failed"):
        asked = root("POST", "/v1/images", {"reference": IMAGE_ID}).json
        record = {"category": "Cancelled", "code": "cancelled", "message": "Stopped."}
        end_badly(api.db, asked["id"], state, record)
        end_badly(api.db, asked["id"], state, record)

    text = root("GET", "/metrics").text

    assert value(text, "operations_total", kind="fetch", state="failed") == 2
    assert value(text, "operations_total", kind="fetch", state="cancelled") == 1


def test_single_disks_and_images_are_for_administrators(
    api: Api, root: Requests, nobody: Requests, attached: str
) -> None:
    """Attached disks and images in use are named to administrators, sums to everybody."""
    insert_image(api.db)
    other = insert_disk(api.db)
    number = api.db.rows("SELECT number FROM disks WHERE uuid = ?", attached)[0][0]
    counts = Counts(api.configuration.run_dir / "counts", "blockd")
    counts.add("disk_requests", str(number), "read", by=7)
    counts.add("disk_requests", "999", "read", by=1)
    counts.write()
    api.db.connection.execute("UPDATE images SET state = 'provisional', verified_at = NULL")

    seen, sums = root("GET", "/metrics").text, nobody("GET", "/metrics").text

    assert value(seen, "disk_requests_total", disk=attached, operation="read") == 7
    assert value(seen, "image_local_bytes", image=IMAGE_ID) == 0
    assert value(seen, "disk_wait_seconds_total", disk=attached) == 0
    assert other not in seen and "999" not in {
        label for _, labels in samples(seen) for _, label in labels
    }
    assert attached not in sums and IMAGE_ID not in sums
    assert value(sums, "disks_size_bytes") == value(seen, "disks_size_bytes")
    problem(root("GET", "/metrics?colour=red"), 400, "parameter-unknown", "colour")


def test_parts_that_do_not_answer_are_down(api: Api, root: Requests) -> None:
    """`part_up` says of each part what /readyz does, which names the one that fails."""
    text = root("GET", "/metrics").text

    assert value(text, "part_up", part="state") == 1
    for part in ("blockd", "mount", "portal"):
        assert value(text, "part_up", part=part) == 0
    failing = root("GET", "/readyz")
    assert problem(failing, 503, "not-ready", "blockd")["field"] == "blockd"
    for part in ("blockd", "FUSE tree", "portal"):
        assert part in failing.json["detail"]


def test_supervisors_word_is_passed_on(api: Api, root: Requests) -> None:
    """Restarts, pauses and the state come from RUN_DIR/supervisor.json, also of an older version."""
    child = {"pid": 5, "started_at": 1000.5, "restarts": 3, "ready": True}
    status = {
        "version": "0", "pid": os.getpid(), "state": "frozen", "fault": "blockd has crashed.",
        "children": {"blockd": {**child, "pause_s": 0.25, "paused_s": 1.5}, "api": child},
        "upgrade": None,
    }  # fmt: skip
    (api.configuration.run_dir / "supervisor.json").write_text(json.dumps(status))

    text = root("GET", "/metrics").text

    assert value(text, "process_restarts_total", process="blockd") == 3
    assert value(text, "process_last_pause_seconds", process="blockd") == 0.25
    assert value(text, "process_pause_seconds_total", process="blockd") == 1.5
    assert value(text, "process_pause_seconds_total", process="api") == 0
    assert value(text, "process_start_time_seconds", process="api") == 1000.5
    assert value(text, "supervisor_state", state="frozen") == 1
    assert value(text, "supervisor_state", state="ready") == 0
    assert value(text, "part_up", part="supervisor") == 0


def test_events_of_before_count_after_the_migration(tmp_path: Path) -> None:
    """What happened before the counters were there is counted."""
    path = tmp_path / "state.db"
    before = next(n for n, text in enumerate(MIGRATIONS) if "CREATE TABLE tallies" in text)
    with closing(sqlite3.connect(path)) as old:
        old.create_function("seal", 2, lambda _, secret: secret)
        for migration in MIGRATIONS[:before]:
            old.executescript(f"BEGIN; {migration} COMMIT;")
        old.execute(f"PRAGMA user_version = {before}")
        for kind in ("disk.created", "disk.created", "image.verified"):
            old.execute(
                "INSERT INTO events (at, kind, subject, message) VALUES ('', ?, 'x', 'It is so.')",
                (kind,),
            )
        old.commit()

    db = Database(path)
    db.migrate()
    found = tallies(db)
    db.close()

    assert found == {"events": {"disk.created": 2, "image.verified": 1}}


def _named(text: str) -> set[str]:
    """Return the metrics that a text names."""
    found = set()
    for name in _PARTS.findall(text):
        for suffix in _SUFFIXES:
            base = name.removesuffix(suffix)
            if base != name and base.endswith("_seconds"):
                name = base
        found.add(name)
    return found


def test_dashboard_and_alerts_name_metrics_that_exist() -> None:
    """Every metric of the dashboard, of the alerts and of METRICS.md is in the catalogue."""
    known = {metric.full_name for metric in catalogue.METRICS}
    dashboard = json.loads((REPOSITORY / "packaging/grafana/stratocache.json").read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    alerts = (REPOSITORY / "packaging/prometheus/alerts.yml").read_text()
    page = (REPOSITORY / "api/METRICS.md").read_text()

    assert len(queries) >= 12
    named = {"dashboard": _named(" ".join(queries)), "alerts": _named(alerts), "page": _named(page)}
    assert {where: names - known for where, names in named.items()} == {
        where: set() for where in named
    }
    assert named["page"] == known
    assert all(len(names) >= 6 for names in named.values())
