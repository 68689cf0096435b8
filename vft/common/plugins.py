"""Objects that the user names as `module:Name`, such as a format or a task of their own."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

from vft.common.errors import UserError


def load_object(name: str) -> Any:
    """What is called `Name` in a module, by `module:Name`. The current folder can be imported from.

    UserError, one line, if the module or the name is not there, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # `vft` and tools/NAME.py do not have it, as `python -m` does
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # the file may be new
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{name}: {module_name} needs the module {error.name}, which is not installed") from error
        where = f"{module_name.replace('.', '/')}.py in {os.getcwd()}"
        raise UserError(f"{name}: there is no module {module_name}; put {where}, or install it") from None
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name}: the module {module_name} cannot be imported ({reason})") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name}: the module {module_name} ({module.__file__}) has no {attribute}{meant}")
    return getattr(module, attribute)
