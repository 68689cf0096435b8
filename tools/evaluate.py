#!/usr/bin/env python
"""The same as `vft evaluate`: vft/cli/evaluate.py."""

from vft.cli.evaluate import main

if __name__ == "__main__":
    main()
