"""The version of vft."""

__version__ = "0.1.0"
