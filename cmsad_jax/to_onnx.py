"""An exported model as ONNX: ``python -m cmsad_jax.to_onnx model.cmsad model.onnx``.

For programs without JAX, on processors. The file holds the network with the weights of all members
and the mean of their probabilities; it maps ``windows`` (``1 *window m``, float32, preprocessed)
and ``present`` (``1 m``, bool) to ``probability`` (``1 *window k``). The sliding window around it,
resampling and scaling are not in it: what they must be stands in its metadata, as JSON, beside the
model card.

It goes through jax2onnx and is checked by onnxruntime before it is written: on noise, with every
set of modalities that the model allows, probabilities must agree within
``TOLERANCE``. jax2onnx needs an older Orbax than the extra ``experiments``: install
``cmsad-jax[onnx]`` into an environment of its own.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from cmsad_jax import export, kernels
from cmsad_jax.modules.network import CMSAD, NetworkConfig, apply, probabilities
from cmsad_jax.named_weights import unflatten_weights
from cmsad_jax.types import ConfigError

TOLERANCE = 1e-5
"""Largest difference of a probability between ONNX and JAX."""

_LARGE = 1024
"""Values of a constant above which it is worth a node of its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cmsad_jax.to_onnx", description="Write an exported model as ONNX."
    )
    parser.add_argument("model", type=Path, help="file of python -m experiments.export")
    parser.add_argument("output", type=Path, help="file to write, such as model.onnx")
    options = parser.parse_args(arguments)
    try:
        difference = write_onnx(export.load(options.model), options.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {size:.1f} MB, within {difference:.1g} of JAX")


def write_onnx(model: export.Model, output: Path) -> float:
    """Write a model as ONNX; returns the largest difference of a probability.

    Raises:
        ConfigError: as ``convert``, or ONNX differs by more than ``TOLERANCE``; nothing is written
            then.
    """
    content = convert(model)
    difference = _difference(model, content)
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"ONNX must give the probabilities of JAX within {TOLERANCE:g}; got a difference of "
            f"{difference:.2g}. Use the .cmsad file."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content)
    return difference


def convert(model: export.Model) -> bytes:
    """The content of an ONNX file.

    Raises:
        ConfigError: the packages are missing, or the model does not say what its network is.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs the packages jax2onnx and onnxruntime; got no {error.name}. Install "
            'cmsad-jax[onnx] into an environment of its own: pip install "cmsad-jax[onnx]".'
        ) from error
    facts = model.description
    function = plain(mean_of_members(model), _example(facts))
    program = jax2onnx.to_onnx(
        function,
        inputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _example(facts)],
        model_name="cmsad",
    )
    for value, name in zip(program.graph.input, ("windows", "present"), strict=True):
        _rename(program.graph, value.name, name)
    _rename(program.graph, program.graph.output[0].name, "probability")
    _shorten_uniform(program.graph)
    described = {"description": json.dumps(dataclasses.asdict(facts)), "model_card": model.card}
    onnx.helper.set_model_props(program, described)
    return program.SerializeToString()


def _shorten_uniform(graph: Any) -> None:
    """Write large constants of one value as that value and a shape: they are most of a file."""
    from onnx import helper, numpy_helper  # pyright: ignore[reportMissingImports]

    for tensor in [*graph.initializer]:
        array = numpy_helper.to_array(tensor)
        if array.size < _LARGE or (array != array.flat[0]).any():
            continue
        graph.initializer.remove(tensor)
        shape = f"{tensor.name}_shape"
        graph.initializer.append(numpy_helper.from_array(np.array(array.shape, np.int64), shape))
        value = numpy_helper.from_array(array.reshape(-1)[:1])
        graph.node.insert(
            0, helper.make_node("ConstantOfShape", [shape], [tensor.name], value=value)
        )


def _rename(graph: Any, old: str, new: str) -> None:
    """Give a value of an ONNX graph another name."""
    for value in (*graph.input, *graph.output):
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _example(facts: export.Description) -> tuple[np.ndarray, np.ndarray]:
    """Windows of noise with all modalities."""
    shape = (1, *facts.window, len(facts.modalities))
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return noise, np.ones((1, len(facts.modalities)), bool)


def mean_of_members(model: export.Model) -> Callable[..., jax.Array]:
    """Mean probabilities ``b *window k`` of windows and ``present``, by the network's own code.

    Raises:
        ConfigError: the model does not say what its network is, its masks come from a distance, or
            it is in a cascade.
    """
    settings = model.description.provenance.get("config")
    settings = settings if isinstance(settings, Mapping) else {}
    config, prediction = settings.get("network"), settings.get("predict")
    if not isinstance(config, Mapping):
        raise ConfigError(
            "a model must say what its network is; got none in its provenance. Export the run "
            "again."
        )
    if isinstance(prediction, Mapping) and prediction.get("mask_from") == "distance":
        raise ConfigError(
            "ONNX holds a network whose masks come from its probabilities; got one whose masks "
            "come from the distance (predict.mask_from). Use the .cmsad file."
        )
    if model.first is not None:
        raise ConfigError(
            "ONNX holds one network; got a cascade of two, with a box to be cut between them. Use "
            "the .cmsad file."
        )
    network = CMSAD(_decode(NetworkConfig, config))
    members = [unflatten_weights(weights) for weights in model.weights]

    def mean(windows: jax.Array, present: jax.Array) -> jax.Array:
        with kernels.written_out():
            outputs = [apply(network, params, windows, present) for params in members]
        return jnp.stack([probabilities(output.logits) for output in outputs]).mean(0)

    return mean


def _decode(kind: Any, value: Any) -> Any:
    """A configuration of its JSON values."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise ConfigError(
                f"a network must have the fields of this version; got {unknown[0]!r}. Use the "
                "version of cmsad-jax that wrote it."
            )
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    return tuple(_decode(None, item) for item in value) if isinstance(value, list) else value


def plain(
    function: Callable[..., jax.Array], example: Sequence[np.ndarray]
) -> Callable[..., jax.Array]:
    """The function of operations that converters know: for CPUs, and without what is not needed."""
    from jax.interpreters import partial_eval

    closed = jax.make_jaxpr(function)(*example)
    inlined = jax.make_jaxpr(lambda *x: _inlined(closed.jaxpr, closed.consts, x)[0])(*example)
    needed, _ = partial_eval.dce_jaxpr(inlined.jaxpr, [True], instantiate=True)
    flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(needed, inlined.consts))
    return lambda *x: flat(*x)[0]


def _inlined(jaxpr: jex.Jaxpr, consts: Sequence[Any], arguments: Iterable[Any]) -> list[Any]:
    """Evaluate a program with its calls, and its choices of a platform, written out."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, jex.Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _results(equation, [read(variable) for variable in equation.invars])
        values |= zip(equation.outvars, results, strict=True)
    return [read(variable) for variable in jaxpr.outvars]


def _results(equation: Any, values: list[Any]) -> list[Any]:
    """What one equation gives."""
    name, params = equation.primitive.name, equation.params
    called: Mapping[str, str] = {
        **dict.fromkeys(("jit", "pjit", "closed_call", "checkpoint", "remat"), "jaxpr"),
        **dict.fromkeys(("custom_vjp_call", "custom_jvp_call", "core_call"), "call_jaxpr"),
    }
    if name == "platform_index":
        known = [platforms is None or "cpu" in platforms for platforms in params["platforms"]]
        return [np.int32(known.index(True) if True in known else len(known) - 1)]
    if name == "cond" and (index := _known(values[0])) is not None:
        branch = params["branches"][min(max(index, 0), len(params["branches"]) - 1)]
        return _inlined(branch.jaxpr, branch.consts, values[1:])
    if name in called:
        inner = params[called[name]]
        return _inlined(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
    if name == "stop_gradient":
        return values
    if name == "reduce_sum":
        return [_summed(values[0], params["axes"])]
    given = equation.primitive.get_bind_params(params)
    result = equation.primitive.bind(*values, **given)
    return list(result) if equation.primitive.multiple_results else [result]


def _known(value: Any) -> int | None:
    """A number that does not depend on the arguments of the program; else None."""
    try:
        return int(value)
    except jax.errors.ConcretizationTypeError:
        return None


def _summed(value: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A sum in short ones: onnxruntime adds one by one, and over a volume that loses a digit."""
    for axis in sorted(axes, reverse=True):
        length = value.shape[axis]
        part = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
        if part > 1:
            split = (*value.shape[:axis], length // part, part, *value.shape[axis + 1 :])
            value = jnp.sum(value.reshape(split), axis + 1)
        value = jnp.sum(value, axis)
    return value


def _difference(model: export.Model, content: bytes) -> float:
    """Largest difference of a probability, over the sets of modalities that are allowed."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    windows, everything = _example(model.description)
    sets = [everything]
    if model.description.allow_missing:
        choices = itertools.product((False, True), repeat=everything.size)
        sets = [np.array([choice]) for choice in choices if any(choice)]
    largest = 0.0
    for present in sets:
        given = windows * present.reshape(1, *[1] * (windows.ndim - 2), -1)
        (ours,) = session.run(None, {"windows": given, "present": present})
        program = model.programs["predict"]
        theirs = np.mean([program(each, given, present) for each in model.weights], 0)
        largest = max(largest, float(np.abs(ours - theirs).max()))
    return largest


if __name__ == "__main__":
    main()
