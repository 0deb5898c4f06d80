"""`/v1/images`: statuses and bodies."""

import pytest
from support.api_daemon import (
    IMAGE_BYTES,
    IMAGE_ID,
    Api,
    Requests,
    insert_image,
    problem,
    standing_in,
)

pytestmark = pytest.mark.root  # callers are root, or are made from root


def test_fetch_is_accepted_with_an_operation(root: Requests) -> None:
    """POST /v1/images answers 202 at once, with the operation and its address."""
    answer = root("POST", "/v1/images", {"reference": IMAGE_ID, "pin": True})

    assert answer.status_code == 202
    assert answer.json["kind"] == "fetch"
    assert answer.json["state"] == "pending"
    assert answer.json["request"] == {"reference": IMAGE_ID, "pin": True}
    assert answer.headers["location"] == f"/v1/operations/{answer.json['id']}"
    assert root("GET", answer.headers["location"]).json["id"] == answer.json["id"]


def test_fetch_that_ends_within_wait_answers_the_image(api: Api, root: Requests) -> None:
    """With ?wait= a fetch that is done in time answers 201 and the image."""
    with standing_in(api.db):
        answer = root("POST", "/v1/images", {"reference": IMAGE_ID}, params={"wait": 30})

    assert answer.status_code == 201
    assert answer.json["id"] == IMAGE_ID
    assert answer.json["entry"]["title"] == "a small system"
    assert answer.headers["location"] == f"/v1/images/{IMAGE_ID}"


def test_images_are_listed_and_shown(api: Api, root: Requests) -> None:
    """GET lists images by state and shows one; an unknown one is 404."""
    insert_image(api.db)

    listed = root("GET", "/v1/images").json
    assert [image["id"] for image in listed["images"]] == [IMAGE_ID]
    assert listed["next"] is None
    assert root("GET", "/v1/images", params={"state": "fetching"}).json["images"] == []
    assert root("GET", f"/v1/images/{IMAGE_ID}").json["size_bytes"] == IMAGE_BYTES
    problem(root("GET", "/v1/images/A"), 404, "image-unknown")


def test_image_is_pinned_and_unpinned(api: Api, root: Requests) -> None:
    """PUT and DELETE on pin change the image, twice without error, and bar its deletion."""
    insert_image(api.db)
    pin = f"/v1/images/{IMAGE_ID}/pin"

    assert root("PUT", pin).json["pinned"] is True
    assert root("PUT", pin).json["pinned"] is True
    problem(root("DELETE", f"/v1/images/{IMAGE_ID}"), 409, "image-pinned")
    assert root("DELETE", pin).json["pinned"] is False
    problem(root("PUT", "/v1/images/A/pin"), 404, "image-unknown")


def test_image_is_deleted(api: Api, root: Requests) -> None:
    """DELETE answers 204 when the image is gone."""
    insert_image(api.db)
    with standing_in(api.db):
        assert root("DELETE", f"/v1/images/{IMAGE_ID}").status_code == 204

    problem(root("GET", f"/v1/images/{IMAGE_ID}"), 404, "image-unknown")


def test_ordinary_users_may_not_delete_or_pin_images(api: Api, nobody: Requests) -> None:
    """Images belong to the host: 403 for those who are not administrators."""
    insert_image(api.db)

    problem(nobody("DELETE", f"/v1/images/{IMAGE_ID}"), 403, "administrator-only")
    problem(nobody("PUT", f"/v1/images/{IMAGE_ID}/pin"), 403, "administrator-only")
