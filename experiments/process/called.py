"""Commands as functions: ``from experiments import predict`` gives what ``predict(config)`` runs.

The name is that of a command's module, which is made callable; its ``call`` is what is called.
"""

import sys
from types import ModuleType
from typing import Any


class _Command(ModuleType):
    def __call__(self, config: Any) -> Any:
        return self.call(config)


def callable_module(name: str) -> None:
    """Let the module of this name be called as its function ``call``."""
    sys.modules[name].__class__ = _Command
