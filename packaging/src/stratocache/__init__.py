"""Stratocache: VM images cached, verified and served as block devices on every host."""

__version__ = "0.1.0"
