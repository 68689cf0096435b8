"""Imported first by scripts: a Python without vft's packages hands over to the checkout's .venv, or says what to do."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from vft.common.interpreter import prefer_venv, report_missing

prefer_venv()
if find_spec("torch") is None:
    report_missing(ModuleNotFoundError(name="torch"))
