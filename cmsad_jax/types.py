"""Axis legend, array aliases and the one error type of the library.

Axes are lower case: ``b`` batch, ``d h w`` slice, row and column, ``c`` channels, ``m``
modalities, ``s`` encoder stages, ``k`` classes, ``p`` ordered pairs of modalities. Channels come
last and depth comes before rows and columns. ``*space`` stands for ``d h w`` (volumes) or ``h w``
(slices): every module and every function of the library runs on both, so axis 0 is always the
batch, the last axis the channels, and whatever lies between them is space.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

Image = Float[Array | np.ndarray, "b *space c"]
"""Modalities of one patient on a common grid, scaled, an absent one all zeros; in a cascade, what
the first network found comes after them."""

Labels = Int[Array | np.ndarray, "b *space"]
"""Class of each voxel, any integer type; 0 is background."""

Logits = Float[Array, "b *space k"]
"""Network output before the sigmoid (``k = 1``) or the softmax (``k > 1``, background first)."""

Present = Bool[Array | np.ndarray, "b m"]
"""Which modalities each example has."""

Feature = Float[Array, "b *space c"]
"""Activation of one encoder stage of one modality."""

Features = Mapping[str, Sequence[Float[Array, "b ..."]]]
"""``features[modality][stage]``, each a ``Feature`` of its stage's size; stage 0 is shallowest."""

AttentionMap = Float[Array, "b *space"]
"""Spatial attention of one stage, float32."""

PerExample = Float[Array, " b"]
"""One value for each example of the batch: what every loss and metric returns."""

Device: TypeAlias = Any
"""A ``jax.Device``; JAX names the class by a variable, which type checkers refuse."""


class ConfigError(ValueError):
    """A setting or a shape that cannot work; the message holds the rule, what came, the remedy.

    Examples:
        >>> issubclass(ConfigError, ValueError)
        True
    """


def check_choices(config: Any) -> None:
    """Raise ``ConfigError`` if a field of a dataclass is none of those its ``Literal`` names.

    Of a tuple of them, each entry must be one, and none twice.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        entry = get_args(hint)[0] if get_origin(hint) is tuple else None
        if get_origin(entry) is Literal:
            choices = get_args(entry)
            several = isinstance(value, tuple)
            if not several or not {*value} <= {*choices} or len({*value}) != len(value):
                raise ConfigError(
                    f"{name} of {type(config).__name__} must be a tuple of different values of "
                    f"{', '.join(map(str, choices))}; got {value!r}. Use {name}=({choices[0]!r},)."
                )
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(
                f"{name} of {type(config).__name__} must be one of {choices}; got {value!r}. "
                f"Use {name}={get_args(hint)[0]!r}."
            )


def check_number(
    name: str,
    value: Any,
    *,
    least: float | int,
    usual: float | int,
    above: bool = False,
    whole: bool = False,
) -> None:
    """Raise ``ConfigError`` unless ``value`` is a finite number of at least (or above) ``least``.

    ``whole`` asks for an integer; ``usual`` is the value that the message proposes. What is traced
    has no value yet and passes.
    """
    if isinstance(value, Tracer):
        return
    kind = numbers.Integral if whole else numbers.Real
    holds = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not holds or value < least or (above and value == least):
        raise ConfigError(
            f"{name} must be a {'whole' if whole else 'finite'} number "
            f"{'above' if above else 'of at least'} {least:g}; got {value!r:.80}. "
            f"Use {usual:g}."
        )


def check_present(present: Any, batch: Any, modalities: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless ``present`` is a mask ``b m`` of these examples and modalities.

    ``batch`` may be symbolic. Integers are refused with the rest: ``~1`` is not false.
    """
    wanted = (batch, len(modalities))
    shape = getattr(present, "shape", None)
    kind = str(getattr(present, "dtype", type(present).__name__))
    if shape != wanted or kind != "bool":
        raise ConfigError(
            "present must be a bool mask with one row for each example and one column for each "
            f"modality of {', '.join(modalities)}; got {kind}"
            f"{'' if shape is None else f' of shape {shape}'}. Use shape {wanted}."
        )


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
"""A name that can become part of a file name, an option or a weight's path."""


def check_names(what: str, names: Any) -> None:
    """Raise ``ConfigError`` unless ``names`` is a tuple of one or more distinct plain names.

    They become names of files, of options and of weights: at most 64 letters, digits, ``.``, ``_``
    and ``-``, the first neither ``.`` nor ``-``, different in more than upper and lower case.
    """
    if not isinstance(names, tuple) or not names:
        raise ConfigError(
            f"{what} must be a tuple of one or more names; got {names!r:.80}. "
            "Use for example ('t2w', 'adc')."
        )
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{what} must be names of at most 64 letters a to z, digits, '.', '_' and '-' that "
                f"start with neither '.' nor '-'; got {name!r:.80}. Rename it."
            )
    if len({name.lower() for name in names}) != len(names):
        raise ConfigError(
            f"{what} must be distinct names, in more than upper and lower case; "
            f"got {names!r:.200}. Name each once."
        )
