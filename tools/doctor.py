#!/usr/bin/env python
"""The same as `vft doctor`: vft/cli/doctor.py."""

from vft.cli.doctor import main

if __name__ == "__main__":
    main()
