"""The fixtures of whole commands."""

from tests.runs.fixtures import commands, world

__all__ = ["commands", "world"]
