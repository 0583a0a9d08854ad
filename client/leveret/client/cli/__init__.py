"""The `leveret` command. Nothing here loads an HTTP client before a command needs one."""

from leveret.client.cli.app import main

__all__ = ["main"]
