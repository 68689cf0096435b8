#!/usr/bin/env python
"""The same as `vft app`: vft/app/command.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vft.cli.main import run_tool

if __name__ == "__main__":
    run_tool("app")
