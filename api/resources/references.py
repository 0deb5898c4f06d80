"""`/v1/references`: what a reference stands for, before anybody fetches it."""

import falcon

from stratocache.api import answers, query
from stratocache.api.models import ReferenceQuestion, read_body
from stratocache.api.service import Service, require_success
from stratocache.fs.resolution import request_resolution


class ReferenceCollection:
    """`/v1/references`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Ask what would be fetched, and why it is trusted or refused: 202 and an operation, or 200
        when that ends within `?wait=`. Its result says `accepted`; nothing is fetched."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        wanted = read_body(request, ReferenceQuestion)
        operation = self._service.start(
            request_resolution(self._service.db, answers.caller(request), wanted.reference), wait_s
        )
        require_success(operation)
        answers.show_work(response, operation)
