"""Implementations by name: one mechanism for everything that a configuration chooses by a word.

Standard library only, so that a configuration can be read and checked before torch is imported.
"""

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry:
    """Names and the functions or classes that they stand for, which are imported at their first use."""

    def __init__(self, key: str, targets: Mapping[str, str], *, accepts_functions: bool = False) -> None:
        """``key``: the configuration key, for error messages. ``targets``: `package.module:name` of each
        implementation, by its name in the configuration. ``accepts_functions``: whether a user may give their own as
        `package.module:function`."""
        self.key, self.accepts_functions = key, accepts_functions
        self._targets = dict(targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is registered, or has the form of a user's own function and those are accepted."""
        return isinstance(name, str) and (name in self._targets or (self.accepts_functions and is_function_name(name)))

    def load(self, name: str) -> Any:
        """Import and return the function or class of ``name``. Raises ValueError if the name is neither registered nor
        an accepted `package.module:function`, or if such a function cannot be imported or is none."""
        if name not in self:
            raise ValueError(unknown_name(self.key, name, self))
        module, _, attribute = self._targets.get(name, name).partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError, SystemExit) as error:
            if name in self._targets:
                raise
            raise ValueError(
                f"{self.key}={name}: it cannot be imported: {error or type(error).__name__}; check its name, its "
                "module and PYTHONPATH"
            ) from error
        if not callable(found):
            raise ValueError(f"{self.key}={name} is not a function: it is {found!r}; name one")
        return found


def is_function_name(name: object) -> bool:
    """Whether ``name`` has the form `package.module:function`."""
    return (
        isinstance(name, str)
        and all(part.isidentifier() for part in name.replace(":", ".", 1).split("."))
        and (name.count(":") == 1)
    )


def unknown_name(key: str, name: object, names: Any) -> str:
    """An error message for a name that is not one of ``names``, with the list and the most similar one."""
    own = ", or your own as package.module:function" if getattr(names, "accepts_functions", False) else ""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    question = f"; did you mean {close[0]}?" if close else ""
    return f"{key}={name!r} is not known; use one of {', '.join(names)}{own}{question}"
