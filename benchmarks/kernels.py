"""How fast the kernels are: attention distillation, correlation, convolution.

``python -m benchmarks.kernels --quick`` times the small preset's shapes in some minutes;
without ``--quick`` the shapes of every preset are timed, longer and beside a copy that no cache
holds. ``--json FILE`` keeps the rows. A row is printed only if the implementation agreed with the
reference, in its value and its gradients (PyTorch in its value); what did not is named below the
table.
"""

import argparse
import functools
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import pytorch, timing
from benchmarks.shapes import Convolution, Stage, convolutions, stages
from benchmarks.timing import Foreign, Operation
from cmsad_jax import kernels
from cmsad_jax.losses.distillation import AttentionConfig, cross_modal_distillation_loss
from experiments.process.accelerator import select_accelerator
from experiments.settings.presets import PRESETS

MODALITIES = ("t2w", "adc", "hbv")
NUM_STAGES = 3

Other = Callable[[Any], Foreign]
"""From the cotangent (None for forward alone) to the operation in PyTorch."""


def random(shape: Sequence[int], dtype: str, *names: object) -> jax.Array:
    """Normal numbers that depend on ``names`` alone."""
    seed = sum((i + 1) * ord(letter) for i, letter in enumerate(repr(names)))
    return jax.random.normal(jax.random.key(seed), tuple(shape)).astype(dtype)


def num_bytes(*trees: Any) -> int:
    """Bytes of all arrays in ``trees``."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def both_modes(
    op: str,
    shape: str,
    dtype: str,
    arguments: tuple[Any, ...],
    implementations: dict[str, Callable[..., Any]],
    reference: str,
    reduction: int,
    other: Other,
    operations: int | None = None,
) -> Iterator[Operation]:
    """The operation forward, and forward with its vector-Jacobian product.

    Forward must read the arguments and write the result. The gradient reads the arguments again
    and the cotangent, and writes one gradient for each argument. ``operations``, of a forward pass
    that is bilinear in two arguments, are done once more for the gradient of each.
    """
    result = jax.eval_shape(implementations[reference], *arguments)
    result_bytes = result.size * result.dtype.itemsize
    forward = num_bytes(arguments) + result_bytes
    common = (op, shape, dtype)
    yield Operation(
        *common,
        "forward",
        arguments,
        implementations,
        reference,
        forward,
        reduction,
        operations,
        other(None) if pytorch.available() else None,
    )
    cotangent = random(result.shape, result.dtype.name, op, shape)
    yield Operation(
        *common,
        "forward+vjp",
        (*arguments, cotangent),
        {name: timing.with_vjp(function) for name, function in implementations.items()},
        reference,
        forward + 2 * num_bytes(arguments) + result_bytes,
        reduction,
        None if operations is None else 3 * operations,
        other(cotangent) if pytorch.available() else None,
    )


def plain_distillation(features: dict[str, list[jax.Array]]) -> jax.Array:
    """Mutual cross-modal distillation as its formula reads, without the library."""

    def attention(feature):
        energy = (feature.astype(jnp.float32) ** 2).mean(-1).reshape(feature.shape[0], -1)
        return energy / jnp.linalg.norm(energy, axis=-1, keepdims=True)

    maps = {name: [attention(f) for f in stages_] for name, stages_ in features.items()}
    terms = [
        ((jax.lax.stop_gradient(teacher) - student) ** 2).sum(-1)
        for t, u in itertools.permutations(maps, 2)
        for teacher, student in zip(maps[t], maps[u], strict=True)
    ]
    return jnp.stack(terms).mean(0)


def distillation(name: str, chosen: Sequence[Stage], dtype: str) -> Iterator[Operation]:
    """Attention maps of three modalities and some stages, and their mutual distillation."""
    features = {
        modality: [random(stage.shape, dtype, modality, stage.name) for stage in chosen]
        for modality in MODALITIES
    }
    loss = functools.partial(
        cross_modal_distillation_loss,
        attention=AttentionConfig(),
        stages=tuple(range(len(chosen))),
        pairs="mutual",
        distance="l2",
        present=None,
    )
    return both_modes(
        "attention-distillation",
        f"{name} {len(MODALITIES)}x{len(chosen)}",
        dtype,
        (features,),
        {"plain": plain_distillation, "library": loss},
        "plain",
        max(stage.shape[-1] for stage in chosen),
        lambda cotangent: pytorch.distillation(features, cotangent),
    )


def correlation(stage: Stage, dtype: str) -> Iterator[Operation]:
    """Correlation of three modalities in the fusion of one stage."""
    batch, channels, count = stage.shape[0], stage.shape[-1], len(MODALITIES)
    g = [random(stage.shape, dtype, modality, stage.name) for modality in MODALITIES]
    alpha, beta, gamma = (
        random((batch, count, count, channels), "float32", name, stage.name)
        for name in ("alpha", "beta", "gamma")
    )
    return both_modes(
        "correlation",
        f"{stage.name} {count}x{'x'.join(map(str, stage.shape))}",
        dtype,
        (g, alpha, beta, gamma),
        {
            name: functools.partial(kernels.correlation, implementation=name)
            for name in ("reference", "xla")
        },
        "reference",
        stage.shape[-1],
        lambda cotangent: pytorch.correlation(g, alpha, beta, gamma, cotangent),
    )


def convolution(shape: Convolution, dtype: str) -> Iterator[Operation]:
    """One convolution of an encoder, native and folded."""
    x = random(shape.input, dtype, "x", shape.name)
    kernel = random(shape.kernel, dtype, "kernel", shape.name)
    names = ("native", "folded") if x.ndim == 5 else ("native",)
    return both_modes(
        "convolution",
        shape.name,
        dtype,
        (x, kernel),
        {
            name: functools.partial(kernels.convolution, strides=shape.strides, implementation=name)
            for name in names
        },
        "native",
        # the kernel's gradient sums over all voxels
        max(math.prod(shape.kernel[:-1]), x.size // x.shape[-1]),
        lambda cotangent: pytorch.convolution(x, kernel, shape.strides, cotangent),
        operations=shape.operations,
    )


OPS = ("distillation", "correlation", "convolution")


def operations(preset: str, dtype: str, ops: Sequence[str] = OPS) -> Iterator[Operation]:
    """What is timed at a preset's shapes, one at a time to spare memory."""
    features = stages(preset)
    if "distillation" in ops:
        yield from distillation(f"{preset}/deepest", features[-NUM_STAGES:], dtype)
        if len(features) > NUM_STAGES:
            yield from distillation(f"{preset}/shallowest", features[:NUM_STAGES], dtype)
    if "correlation" in ops:
        for stage in (features[0], features[-1]):
            yield from correlation(stage, dtype)
    if "convolution" in ops:
        for shape in convolutions(preset):
            yield from convolution(shape, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), help="whose shapes; all, or small if quick"
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="which; all by default")
    options = parser.parse_args(arguments)
    select_accelerator("auto")
    presets = options.presets or (["small"] if options.quick else list(PRESETS))
    effort = timing.QUICK if options.quick else timing.Effort()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.kernels {shlex.join(arguments)}".strip()

    copy = timing.copy_bandwidth(quick=options.quick, effort=effort)
    dtypes = {name: ("float32", PRESETS[name].network.dtype) for name in presets}
    rates = {
        dtype: timing.product_rate(dtype, quick=options.quick, effort=effort)
        for dtype in sorted({dtype for pair in dtypes.values() for dtype in pair})
    }
    products = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in rates.items())
    print(f"{timing.device()}; {timing.versions()}\n`{command}`")
    print(f"copy: {copy / 1e9:.1f} GB/s; matrix product: {products} GFLOP/s\n")
    rows, left_out = [], []
    for preset in presets:
        for dtype in dict.fromkeys(dtypes[preset]):
            for operation in tqdm(
                operations(preset, dtype, options.ops),
                f"{preset} {dtype}",
                unit="op",
                leave=False,
                disable=None,
            ):
                found, notes = timing.compare(
                    operation,
                    copy_bytes_per_s=copy,
                    operations_per_s=rates[dtype],
                    effort=effort,
                )
                rows += found
                left_out += notes
    print("\n".join([timing.table(rows), *left_out]))
    if options.json:
        timing.save_json(
            options.json,
            rows,
            command=command,
            copy_gb_per_s=copy / 1e9,
            product_gflop_per_s={dtype: rate / 1e9 for dtype, rate in rates.items()},
            left_out=left_out,
        )


if __name__ == "__main__":
    main()
