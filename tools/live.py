#!/usr/bin/env python
"""The same as `vft live`: vft/cli/live.py."""

from vft.cli.live import main

if __name__ == "__main__":
    main()
