"""The web pages in a real browser: readable by everybody, everywhere, with and without a script."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect
from support.api_daemon import IMAGE_ID, Api, standing_in
from support.browser import WIDTHS, Tab, chromium, tab
from support.contents import MIB, Contents
from support.network_client import PASSWORD, add_account
from support.page_world import FETCHING_IMAGE, ROOT, World, furnish, page_server

from stratocache.fs import inventory
from stratocache.fs.accounts import find_account

pytestmark = [pytest.mark.root, pytest.mark.slow]

_TABS_MAX = 60
THEMES: dict[str, tuple[str, ...]] = {"light": (), "dark": ("color-contrast",)}
"""And the rules of axe that are held against each; none = all."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with chromium() as running:
        yield running


@pytest.fixture
def world(api: Api) -> World:
    """Something of everything, and an account."""
    add_account(api.db, "jane", "operator", quota_disks=4, quota_bytes=2**40)
    return furnish(api.db, api.configuration.state_dir)


@pytest.fixture
def address(api: Api, world: World) -> Iterator[str]:
    """Where the pages are, as root sees them."""
    with page_server(api.configuration, api.db) as served:
        yield served


def _paths(world: World) -> dict[str, str]:
    return {
        "overview": "/",
        "images": "/images",
        "image": f"/images/{IMAGE_ID}",
        "image-on-its-way": f"/images/{FETCHING_IMAGE}",
        "disks": "/disks",
        "disk": f"/disks/{world.disk}",
        "attachments": "/attachments",
        "operations": "/operations",
        "operation": f"/operations/{world.running}",
        "preview": f"/operations/{world.resolved}",
        "events": "/events",
        "cache": "/cache",
        "accounts": "/accounts",
        "account": "/accounts/jane",
        "audit": "/audit",
        "login": "/login",
        "logout": "/logout",
    }


def test_every_page_is_accessible_and_fits(browser: Browser, address: str, world: World) -> None:
    """axe finds nothing serious on any page, narrow and wide, by day and by night, and no page is
    wider than its screen; what is folded is open. The theme changes nothing but colours."""
    with tab(browser, address) as opened:
        for name, path in _paths(world).items():
            opened.open(path)
            opened.page.evaluate(
                "for (const d of document.querySelectorAll('main details')) d.open = true"
            )
            for width in WIDTHS:
                for theme, rules in THEMES.items():
                    opened.look(width, theme)
                    opened.shoot(f"{name}-{width}-{theme}")
                    assert opened.findings(*rules) == []
                beyond = opened.page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert beyond <= 0, f"{name} at {width}"


def test_every_page_is_readable_without_a_script(
    browser: Browser, address: str, world: World
) -> None:
    """Without JavaScript all is there to be read, nothing that would not work is offered, and one is
    told."""
    with tab(browser, address, java_script_enabled=False) as opened:
        for name, path in _paths(world).items():
            opened.open(path)
            page = opened.page
            expect(page.locator("h1")).to_be_visible()
            for button in page.locator("button:visible").all():
                form = button.locator("xpath=ancestor::form[@action]")
                assert form.count() == 1, f"{name}: {button.inner_html()}"
            if name not in ("login", "logout"):
                expect(page.locator("noscript")).to_be_visible()
                assert len(page.locator("main").inner_text()) > 100
        opened.open(f"/disks/{world.disk}")
        opened.page.get_by_text("QEMU", exact=True).click()
        expect(opened.page.get_by_text("driver=iscsi")).to_be_visible()


def test_disk_is_created_by_keyboard_alone(api: Api, browser: Browser, address: str) -> None:
    """Tab, Enter and typing are enough to create a disk; the focus is always seen."""
    with standing_in(api.db), tab(browser, address) as opened:
        opened.open("/disks")
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to content"
        page.keyboard.press("Enter")
        _tab_to(page, "summary")
        page.keyboard.press("Enter")
        _tab_to(page, "[name=size_bytes]")
        page.keyboard.type("1 GiB")
        _tab_to(page, "[name=tag]")
        page.keyboard.type("by keyboard")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{address}/disks/*")
        expect(page.locator("h1")).to_have_text("by keyboard")
        expect(page.locator("#status")).to_have_text("The disk is there.")
    (made,) = inventory.disks(api.db, ROOT, tag="by keyboard")
    assert made.size_bytes == 2**30


def _tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus, which must be seen wherever it is."""
    for _ in range(_TABS_MAX):
        page.keyboard.press("Tab")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_faults_are_told_where_they_are(api: Api, browser: Browser, address: str) -> None:
    """A value that is refused, here or by the API, is marked, and the sentence is at the form."""
    with tab(browser, address) as opened:
        opened.open("/disks#create")
        page = opened.page
        form = page.locator("form[data-path='/v1/disks']")
        form.locator("[name=size_bytes]").fill("a lot")
        form.get_by_role("button", name="Create").click()
        expect(form.locator(".outcome")).to_contain_text("is not a size")
        expect(form.locator("[name=size_bytes]")).to_be_focused()
        expect(form.locator("[aria-invalid=true]")).to_have_count(1)
        form.locator("[name=size_bytes]").fill("1000")
        form.get_by_role("button", name="Create").click()
        expect(form.locator(".outcome")).to_contain_text("size_bytes")
        opened.faults.clear()  # the browser's own note of the answer 400


def test_theme_and_live_are_remembered(browser: Browser, address: str) -> None:
    """The switches change the theme and stop the exchange, also on the next page."""
    with tab(browser, address, color_scheme="light") as opened:
        opened.open("/")
        page = opened.page
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        by_day = page.evaluate(ground)
        page.get_by_role("button", name="Theme").click()
        page.get_by_role("button", name="Theme").click()
        expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
        assert page.evaluate(ground) != by_day
        page.get_by_role("button", name="Live").click()
        opened.open("/disks")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        expect(page.get_by_role("button", name="Live")).to_have_attribute("aria-pressed", "false")


def test_what_changes_is_exchanged(api: Api, browser: Browser, address: str, world: World) -> None:
    """A page that is open shows what has become of an operation, and leaves a form alone."""
    with tab(browser, address) as opened:
        opened.open(f"/operations/{world.running}")
        page = opened.page
        expect(page.locator("#operation progress")).to_be_visible()
        with page.expect_request(lambda request: request.resource_type == "fetch") as asked:
            pass
        assert asked.value.headers["x-stratocache-timer"] == "refresh"  # nobody uses the session
        api.db.connection.execute(
            "UPDATE operations SET progress_bytes = total_bytes, state = 'done' WHERE id = ?",
            (world.running,),
        )
        expect(page.locator("#operation .badge").first).to_have_text("done")
        opened.open(f"/disks/{world.disk}")
        page.locator("[name=instance]").fill("half typed")
        api.db.connection.execute(
            "UPDATE snapshots SET tag = 'renamed' WHERE disk_uuid = ?", (world.disk,)
        )
        expect(page.locator("#snapshots th[scope=row]").first).to_contain_text("renamed")
        assert page.locator("[name=instance]").input_value() == "half typed"
        expect(page.locator("[name=instance]")).to_be_focused()


def test_upload_goes_on_where_it_was_cut(
    api: Api, browser: Browser, address: str, tmp_path: Path
) -> None:
    """A file is uploaded in parts; one that is cut is sent again, and the disk has the whole."""
    contents = Contents(api.configuration, api)
    uuid = contents.add(16 * MIB, b"old" * MIB)
    file = tmp_path / "upload.img"
    file.write_bytes(random.Random(7).randbytes(12 * MIB))
    cut: list[str] = []

    def cut_once(route: Route) -> None:
        part = route.request.headers.get("content-range", "")
        if part.startswith(f"bytes {8 * MIB}-") and not cut:
            cut.append(part)
            route.abort("connectionreset")
        else:
            route.continue_()

    with tab(browser, address) as opened:
        opened.open(f"/disks/{uuid}")
        page = opened.page
        page.route("**/content", cut_once)
        page.locator("#upload [name=file]").set_input_files(file)
        page.get_by_role("button", name="Upload").click()
        expect(page.locator("#status")).to_contain_text("Uploading: 66 %")
        expect(page.locator("#status")).to_contain_text("it is the disk's content now")
        assert [fault for fault in opened.faults if "CONNECTION_RESET" not in fault] == []
        opened.faults.clear()
    assert len(cut) == 1
    assert contents.read(uuid) == file.read_bytes().ljust(16 * MIB, b"\0")


def test_password_is_all_that_a_stranger_needs(api: Api, opened_login: Tab) -> None:
    """The login leads back to where one wanted to go, and the cookie is kept from scripts."""
    page = opened_login.page
    page.get_by_label("Name").fill("jane")
    page.get_by_label("Password").fill("wrong, wrong, wrong")
    page.keyboard.press("Enter")
    expect(page.locator("form .outcome")).to_contain_text("wrong")
    opened_login.faults.clear()  # the browser's own note of the answer 401
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url("**/images?state=verified")
    expect(page.locator(".who")).to_have_text("jane")
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    page.goto(f"{opened_login.address}/images")
    assert page.url.endswith("/login?next=%2Fimages")


def test_own_rights_are_not_taken_away(api: Api, opened_login: Tab) -> None:
    """An administrator who lowers, disables or deletes their own account reads beside the button why
    that is refused, and stays one."""
    add_account(api.db, "zoe", "admin")
    page = opened_login.page
    page.get_by_label("Name").fill("zoe")
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url("**/images?state=verified")
    form = page.locator("section[aria-labelledby=change-title] form")
    for change in ("role", "enabled", "delete"):
        opened_login.open("/accounts/zoe")
        if change == "role":
            form.get_by_label("Role").select_option("user")
        elif change == "enabled":
            form.get_by_label("Enabled").uncheck()
        form.get_by_role("button", name="Delete" if change == "delete" else "Save").click()
        if change == "delete":
            page.locator("#confirm-yes").click()
        expect(form.locator(".outcome")).to_contain_text("ask another administrator")
        opened_login.faults.clear()  # the browser's own note of the answer 409
    assert (found := find_account(api.db, "zoe")) is not None
    assert (found.role, found.enabled) == ("admin", True)


@pytest.fixture
def opened_login(api: Api, browser: Browser) -> Iterator[Tab]:
    """The login page of the network's side, where nobody is known."""
    add_account(api.db, "jane", "operator")
    with (
        page_server(api.configuration, api.db, local=False) as served,
        tab(browser, served) as opened,
    ):
        opened.open("/images?state=verified")
        yield opened
