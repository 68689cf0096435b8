#!/usr/bin/env python
"""The same as `vft inspect`: vft/cli/inspect_batch.py."""

from vft.cli.inspect_batch import main

if __name__ == "__main__":
    main()
