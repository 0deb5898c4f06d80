"""`/v1`, `/healthz`, `/readyz`, `/metrics`: what this is, whether it works, and how."""

import json
import threading
from typing import TYPE_CHECKING

import falcon

from stratocache import __version__
from stratocache.api import answers, models, query, readiness, sizes
from stratocache.api.request_counts import RequestCounts
from stratocache.api.service import Service
from stratocache.api.web_certificate import fingerprint
from stratocache.cache.errors import Unreachable

if TYPE_CHECKING:
    from stratocache.api.metrics import Metrics

CAPABILITIES = (
    "launches",
    "images",
    "disks",
    "attachments",
    "snapshots",
    "operations",
    "events",
    "references",
    "overview",
    "accounts",
    "cache",
    "metrics",
    "catalogue:stratuslab",
    "target:tgt",
)


class Index:
    """`/v1`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Tell version, capabilities, limits, and who the caller is taken for."""
        query.require_known(request)
        caller = answers.caller(request)
        document = {
            "name": "stratocache",
            "version": __version__,
            "api": "v1",
            "capabilities": CAPABILITIES,
            "catalogues": sorted(self._service.configuration.catalogues),
            "limits": {
                "size_bytes_min": sizes.SIZE_BYTES_MIN,
                "size_bytes_max": sizes.SIZE_BYTES_MAX,
                "size_bytes_multiple": sizes.SECTOR_BYTES,
                "body_bytes_max": models.BODY_BYTES_MAX,
                "tag_characters_max": models.TAG_CHARACTERS_MAX,
                "launch_disks_max": models.DISKS_MAX,
                "wait_s_max": query.WAIT_S_MAX,
                "page_length": query.PAGE_LENGTH,
                "page_length_max": query.PAGE_LENGTH_MAX,
            },
            "tls_certificate_sha256": fingerprint(self._service.configuration),
            "caller": {
                "name": caller.name,
                "role": caller.role,
                "scopes": sorted(caller.scopes),
                "administrator": caller.administrator,
            },
        }
        response.content_type = falcon.MEDIA_JSON
        response.data = json.dumps(document).encode()


class Liveness:
    """`/healthz`."""

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Answer as long as this process can."""
        response.content_type = falcon.MEDIA_JSON
        response.data = b'{"status":"alive"}'


class Readiness:
    """`/readyz`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Answer 200 when every part works, else 503 naming the first part that does not."""
        faults = readiness.faults(self._service.configuration, self._service.db)
        if faults:
            raise Unreachable("not-ready", " ".join(faults.values()), field=next(iter(faults)))
        response.content_type = falcon.MEDIA_JSON
        response.data = b'{"status":"ready"}'


class MetricsPage:
    """`/metrics`."""

    def __init__(self, service: Service, requests: RequestCounts) -> None:
        self._service = service
        self._requests = requests
        self._lock = threading.Lock()
        self._metrics: Metrics | None = None

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Answer in Prometheus' text format; only operators see single images and disks."""
        query.require_known(request)
        response.data = self._made().text(everything=answers.caller(request).operator)
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"

    def _made(self) -> "Metrics":
        """Return what writes the metrics; its library is imported when somebody asks first."""
        with self._lock:
            if self._metrics is None:
                from stratocache.api.metrics import Metrics

                service = self._service
                self._metrics = Metrics(
                    service.configuration, service.db, service.space, self._requests
                )
            return self._metrics
