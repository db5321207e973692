"""What ``--help`` shows: every option with its meaning and default, none that follows from others.

The commands pass ``REGISTRY`` to tyro, which otherwise shows ``{None}|PATH`` for a path that may be
left out, no meaning for the entries of nested tuples, and fields of the network that the data fix.
"""

import typing
from types import NoneType

import docstring_parser
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

from cmsad_jax.modules.network import NetworkConfig
from cmsad_jax.training import LossConfig

FROM_THE_DATA: dict[type, tuple[str, ...]] = {
    NetworkConfig: ("modalities", "num_classes", "prior"),
    LossConfig: ("ignored_label",),
}
"""Fields that ``experiments.settings.command_line.complete`` fills in."""

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(
    info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """``X | None`` is shown as ``X``; the word None is understood all the same."""
    kinds = typing.get_args(info.type)
    if NoneType not in kinds or len(kinds) != 2:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    given = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(kind, typing.cast(typing.Any, info.markers))
    )
    if isinstance(given, UnsupportedTypeAnnotationError):
        return given
    return PrimitiveConstructorSpec(
        nargs=given.nargs,
        metavar=given.metavar,
        instance_from_str=lambda words: (
            None if words == ["None"] else given.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or given.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else given.str_from_instance(value)
        ),
        choices=None if given.choices is None else (*given.choices, "None"),
    )


@REGISTRY.struct_rule
def _filled_in(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Fields but for those that follow from the data, which keep their defaults."""
    kind = next((kind for kind in FROM_THE_DATA if info.type is kind), None)
    if kind is None:
        return None
    default = info.default if isinstance(info.default, kind) else kind()
    parameters = docstring_parser.parse_from_object(kind).params
    meaning = {parameter.arg_name: parameter.description for parameter in parameters}
    hints = typing.get_type_hints(kind)
    return StructConstructorSpec(
        instantiate=kind,
        fields=tuple(
            StructFieldSpec(name, hints[name], getattr(default, name), meaning.get(name))
            for name in hints
            if name not in FROM_THE_DATA[kind]
        ),
    )


@REGISTRY.struct_rule
def _stages(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Kernels or strides: one option for each stage of the encoder."""
    if info.type != tuple[tuple[int, ...], ...] or not isinstance(info.default, tuple):
        return None
    axes = {2: "h w", 3: "d h w"}
    return StructConstructorSpec(
        instantiate=lambda **stages: tuple(stages.values()),
        fields=tuple(
            StructFieldSpec(
                str(stage),
                tuple[int, ...],
                values,
                f"Of stage {stage}, {axes[len(values)]}.",
            )
            for stage, values in enumerate(info.default)
        ),
    )
