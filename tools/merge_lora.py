#!/usr/bin/env python
"""The same as `vft merge`: vft/cli/merge_lora.py."""

from vft.cli.merge_lora import main

if __name__ == "__main__":
    main()
