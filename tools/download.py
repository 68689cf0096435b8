#!/usr/bin/env python
"""The same as `vft download`: vft/cli/download.py."""

from vft.cli.download import main

if __name__ == "__main__":
    main()
