"""The user's own functions and classes, named in a configuration as `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .errors import ColdstillError, type_and_line


class PluginNotFound(ColdstillError):
    """A `module:name` in a configuration cannot be imported.

    Fix: start from the folder that holds the module, or install it on every node.
    """


def is_plugin(text: str) -> bool:
    """Whether a setting names an object as `module:name`."""
    return ":" in text


def load_plugin(text: str, *, key: str) -> Any:
    """The object that `text`, such as `my_module:my_function`, names; `key` is the setting that holds it.

    The module is looked up on Python's path, then in the current folder: a file there cannot replace an installed
    package. On a cluster, every node must be able to import the module.

    Raises `PluginNotFound`.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name.isidentifier():
        raise PluginNotFound(key, found=text, wanted="module:name, such as my_module:my_function")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise PluginNotFound(
            f"{key}: {text}",
            found=type_and_line(error),
            wanted=f"a module {module_name} that imports",
            fix=f"start from the folder that holds {module_name}.py, or install it on every node",
        ) from error
    if not hasattr(found, name):
        raise PluginNotFound(
            f"{key}: {text}", found=f"no {name} in {getattr(found, '__file__', module_name)}", wanted=f"a {name} there"
        )
    return getattr(found, name)
