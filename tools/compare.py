#!/usr/bin/env python
"""The same as `vft compare`: vft/cli/compare.py."""

from vft.cli.compare import main

if __name__ == "__main__":
    main()
