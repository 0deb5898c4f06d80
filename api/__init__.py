"""People and launchers asking: HTTP resources, command line, operations."""
