"""The web pages: what people look at, rendered on the server (PAGES.md)."""
