#!/usr/bin/env python
"""The same as `vft plan`: vft/cli/plan.py."""

from vft.cli.plan import main

if __name__ == "__main__":
    main()
