"""Demonstration images, virtual machines and the story that `make demo` tells."""
