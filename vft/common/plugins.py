"""Classes that a configuration names as `module:Class`, such as a task or a format of the user's own."""

from __future__ import annotations

import importlib
import os
import sys

from vft.common.errors import UserError, first_line

only_own = False
"""Whether classes of other packages are refused: in `vft app`, whose settings may come from anywhere."""


def load_class(name: str) -> type:
    """The class `module:Class` of an installed package or of the current folder.

    Raises:
        UserError, one line: there is no such module or class, or the module cannot be imported.
    """
    module_name, _, class_name = name.partition(":")
    if only_own and not module_name.startswith("vft."):
        raise UserError(f"{name} is code of its own, which this page doesn't run; use `vft train`")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file there hides no installed package
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file raises
        where = "looked in the current folder and among the installed packages"
        raise UserError(f"cannot import {module_name}: {first_line(error)}; {where}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"{module_name} has no class {class_name!r}; name it as module:Class")
    return found
