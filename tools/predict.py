#!/usr/bin/env python
"""The same as `vft predict`: vft/cli/predict.py."""

from vft.cli.predict import main

if __name__ == "__main__":
    main()
