"""Which page is where."""

import falcon

from stratocache.api.login import Login
from stratocache.api.pages.accounts import AccountPage, AccountsPage
from stratocache.api.pages.attachments import AttachmentsPage
from stratocache.api.pages.audit import AuditPage
from stratocache.api.pages.cache import CachePage
from stratocache.api.pages.disks import DiskPage, DisksPage
from stratocache.api.pages.events import EventsPage
from stratocache.api.pages.images import ImagePage, ImagesPage
from stratocache.api.pages.operations import OperationPage, OperationsPage
from stratocache.api.pages.overview import OverviewPage
from stratocache.api.pages.rendering import Pages
from stratocache.api.pages.sign_in import LoginPage, LogoutPage
from stratocache.api.pages.static_files import StaticFiles
from stratocache.api.service import Service


def add_pages(app: falcon.App[falcon.Request, falcon.Response], service: Service) -> Pages:
    """Add every page to the application."""
    static = StaticFiles()
    pages = Pages(service, static)
    login = Login(service.configuration.api, service.db)
    app.add_route("/", OverviewPage(pages))
    app.add_route("/images", ImagesPage(pages))
    app.add_route("/images/{image_id}", ImagePage(pages))
    app.add_route("/disks", DisksPage(pages))
    app.add_route("/disks/{uuid}", DiskPage(pages))
    app.add_route("/attachments", AttachmentsPage(pages))
    app.add_route("/operations", OperationsPage(pages))
    app.add_route("/operations/{operation_id}", OperationPage(pages))
    app.add_route("/events", EventsPage(pages))
    app.add_route("/cache", CachePage(pages))
    app.add_route("/accounts", AccountsPage(pages))
    app.add_route("/accounts/{name}", AccountPage(pages))
    app.add_route("/audit", AuditPage(pages))
    app.add_route("/login", LoginPage(pages, login))
    app.add_route("/logout", LogoutPage(pages))
    app.add_route("/static/{name}", static)
    return pages
