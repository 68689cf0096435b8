"""The fixtures of whole commands."""

from tests.runs.fixtures import commands, learned, world

__all__ = ["commands", "learned", "world"]
