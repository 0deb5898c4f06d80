"""`python -m stratocache` is the `stratocache` command."""

from stratocache.api.command_line import main

main()
