"""What is run: the commands, and, for notebooks and programs, whole jobs as functions.

``cross_validate(Config(...))`` returns what ``metrics.json`` holds,
``predict(PredictCommand(...))`` what ``predictions.json`` holds, and
``evaluate(EvaluateConfig(...))`` the figures. Names are resolved when they are first used. A
process that was started as a command says so before JAX is loaded, which takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from experiments.process.greeting import greet

if TYPE_CHECKING:
    from experiments.settings.config import Config
    from experiments.settings.presets import PRESETS
    from experiments.studies.cross_validation import cross_validate

_HOME = {
    "Config": "settings.config",
    "EvaluateConfig": "evaluate",
    "PRESETS": "settings.presets",
    "PredictCommand": "predict",
    "cross_validate": "studies.cross_validation",
}
_COMMANDS = ("evaluate", "predict")
"""Modules that are called as functions."""

__all__ = ["PRESETS", "Config", "cross_validate"]

greet(__name__)


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_COMMANDS})
