"""Time compiled functions, beside what a copy and a matrix product reach on the machine just then.

A result is timed only after it was compared with the reference's. Times are medians of calls that
end in ``block_until_ready``, of programs compiled ahead, on random inputs.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CACHE_MULTIPLE = 8
"""Arrays of the copy are this many times the last-level cache, so that memory is what is timed."""

ACCELERATOR_CACHE_BYTES = 128 * 2**20
"""Upper bound of the last-level cache of present accelerators, which do not report theirs."""

QUICK_COPY_BYTES = 32 * 2**20

PRODUCT_SIZES = {"cpu": 2048, "quick": 1024, "accelerator": 8192}
"""Rows and columns of the matrices whose product says how fast the machine multiplies."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long each program is timed: until ``seconds`` have passed, within the bounds of calls."""

    seconds: float = 2.0
    min_calls: int = 7
    max_calls: int = 200
    warm_up_calls: int = 2

    def __post_init__(self):
        if not 1 <= self.min_calls <= self.max_calls:
            raise ValueError(
                "min_calls must be from 1 to max_calls; "
                f"got {self.min_calls} and {self.max_calls}. Use min_calls=7, max_calls=200."
            )


QUICK = Effort(seconds=0.2, min_calls=3, max_calls=20, warm_up_calls=1)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Times of one program.

    Attributes:
        median_s: median of the calls.
        iqr_s: third minus first quartile.
        temporary_bytes: peak of the temporary buffers, from XLA's memory analysis; None elsewhere.
        num_calls: how many calls were timed.
        cpu_s: median of the processor time of all threads of this process: on a machine that others
            use as well it says what wall-clock time cannot. Waiting threads may spin, and count.
    """

    median_s: float
    iqr_s: float
    temporary_bytes: int | None
    num_calls: int
    cpu_s: float


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The same operation in another framework.

    Attributes:
        call: does what is timed, and returns when it is done.
        value: the forward result, laid out as the reference's.
    """

    call: Callable[[], Any]
    value: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One thing to compute, and several ways to do so.

    Attributes:
        op, shape, dtype, mode: what is computed, as printed.
        arguments: random inputs, a pytree for each parameter.
        implementations: name to function of the arguments. All must return the same structure.
        reference: name of the one that defines the result and the speed-up.
        moved_bytes: least traffic to memory: each input read once, each result written once, and
            what the backward pass has to read again.
        reduction: length of the longest sum behind one result, which sets the tolerance.
        operations: multiplications and additions that cannot be avoided, where they are what takes
            the time; None where it is the traffic.
        pytorch: the same in PyTorch, or None.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    arguments: tuple[Any, ...]
    implementations: Mapping[str, Callable[..., Any]]
    reference: str
    moved_bytes: int
    reduction: int
    operations: int | None = None
    pytorch: Foreign | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``None`` where something could not be had."""

    op: str
    shape: str
    dtype: str
    mode: str
    implementation: str
    median_ms: float
    iqr_ms: float
    cpu_ms: float
    """Processor time of this process."""
    temporary_mb: float | None
    moved_gb: float
    copy_share: float
    """Copy time of as many bytes over the median; above 1 the data did not leave the cache."""
    operations_g: float | None
    rate_share: float | None
    """Time of a matrix product of as many operations over the median."""
    speedup_reference: float
    speedup_pytorch: float | None
    device: str
    versions: str


def measure(function: Callable[..., Any], *arguments: Any, effort: Effort = QUICK) -> Measurement:
    """Compile ``function`` for ``arguments`` ahead of time and time the program."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    return measure_calls(
        lambda: jax.block_until_ready(program(*arguments)),
        effort=effort,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )


def measure_calls(
    call: Callable[[], Any], *, effort: Effort = QUICK, temporary_bytes: int | None = None
) -> Measurement:
    """Time a call that returns when its work is done."""
    memory = {"it": temporary_bytes}
    return measure_in_turn({"it": call}, effort=effort, temporary_bytes=memory)["it"]


def measure_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    *,
    effort: Effort = QUICK,
    temporary_bytes: Mapping[str, int | None] | None = None,
) -> dict[str, Measurement]:
    """Time several calls in turn, so that what else the machine does falls on all alike.

    Each is called as often; ``effort.seconds`` is for each of them.
    """
    for call in calls.values():
        for _ in range(effort.warm_up_calls):
            call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    end, count = time.perf_counter() + effort.seconds * len(calls), 0
    while count < effort.min_calls or (time.perf_counter() < end and count < effort.max_calls):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        count += 1
    found = {}
    for name, values in times.items():
        first, median, third = np.percentile([wall for wall, _ in values], [25, 50, 75])
        cpu = float(np.median([cpu for _, cpu in values]))
        memory = None if temporary_bytes is None else temporary_bytes.get(name)
        found[name] = Measurement(float(median), float(third - first), memory, count, cpu)
    return found


def temporary_bytes(program: Any) -> int | None:
    """Peak of a compiled program's temporary buffers, where XLA says."""
    memory = program.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)


def agreeing(operation: Operation) -> tuple[Operation, list[str]]:
    """``operation`` with those implementations alone that agree with the reference; why without.

    Gradients are compared too, but not PyTorch's. An implementation that refuses the shape, or that
    cannot be compiled here, is left out as well.

    The tolerance, relative to the largest value of each result: rounding of the result to its
    type, and float32 rounding that grows with the root of the length of the sums. Accelerators
    multiply float32 in fewer bits (TF32, 10 of them) unless told otherwise: JAX is told for the
    comparison, though not where it is timed, and PyTorch is allowed as many.
    """
    tolerance = 4 * float(
        jnp.finfo(operation.dtype).eps + jnp.finfo(jnp.float32).eps * math.sqrt(operation.reduction)
    )

    def leaves(name: str) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            result = jax.jit(operation.implementations[name])(*operation.arguments)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(result)]

    def fault(name: str) -> str:
        try:
            if name == "pytorch":
                assert operation.pytorch is not None
                allowed = tolerance + (0.0 if jax.default_backend() == "cpu" else 2.0**-8)
                wanted, results = expected[:1], [operation.pytorch.value()]
                operation.pytorch.call()
            else:
                allowed, wanted, results = tolerance, expected, leaves(name)
        except Exception as error:
            return first_line(error)
        for want, got in zip(wanted, results, strict=True):
            scale = np.abs(want).max(initial=np.finfo(np.float32).tiny)
            error = np.abs(want - got).max(initial=0.0) / scale
            if not error <= allowed:  # also where the error is not a number
                return f"{error:.2e} of the largest value off, {allowed:.2e} allowed"
        return ""

    expected = leaves(operation.reference)
    names = [name for name in operation.implementations if name != operation.reference]
    faults = {name: fault(name) for name in [*names, *(["pytorch"] if operation.pytorch else [])]}
    agree = {name: f for name, f in operation.implementations.items() if not faults.get(name)}
    title = f"{operation.op} {operation.shape} {operation.dtype} {operation.mode}"
    return (
        dataclasses.replace(
            operation,
            implementations=agree,
            pytorch=None if faults.get("pytorch") else operation.pytorch,
        ),
        [f"left out: {title} by {name}: {why}" for name, why in faults.items() if why],
    )


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def compare(
    operation: Operation,
    *,
    copy_bytes_per_s: float,
    operations_per_s: float,
    effort: Effort = QUICK,
) -> tuple[list[Row], list[str]]:
    """One row for each implementation of ``operation``, PyTorch's last; and what was left out.

    See ``agreeing``; the rates are those of ``copy_bandwidth`` and ``product_rate``.
    """
    operation, left_out = agreeing(operation)
    programs = {
        name: jax.jit(function).lower(*operation.arguments).compile()
        for name, function in operation.implementations.items()
    }
    calls: dict[str, Callable[[], Any]] = {
        name: lambda program=program: jax.block_until_ready(program(*operation.arguments))
        for name, program in programs.items()
    }
    if operation.pytorch is not None:
        calls["pytorch"] = operation.pytorch.call
    measured = measure_in_turn(
        calls,
        effort=effort,
        temporary_bytes={name: temporary_bytes(program) for name, program in programs.items()},
    )
    pytorch = measured.get("pytorch")
    rows = [
        Row(
            op=operation.op,
            shape=operation.shape,
            dtype=operation.dtype,
            mode=operation.mode,
            implementation=name,
            median_ms=1e3 * one.median_s,
            iqr_ms=1e3 * one.iqr_s,
            cpu_ms=1e3 * one.cpu_s,
            temporary_mb=None if one.temporary_bytes is None else one.temporary_bytes / 1e6,
            moved_gb=operation.moved_bytes / 1e9,
            copy_share=operation.moved_bytes / one.median_s / copy_bytes_per_s,
            operations_g=None if operation.operations is None else operation.operations / 1e9,
            rate_share=None
            if operation.operations is None
            else operation.operations / one.median_s / operations_per_s,
            speedup_reference=measured[operation.reference].median_s / one.median_s,
            speedup_pytorch=None if pytorch is None else pytorch.median_s / one.median_s,
            device=device(),
            versions=versions(),
        )
        for name, one in measured.items()
    ]
    return rows, left_out


def with_vjp(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a cotangent as its last argument, returning its value and its gradients."""

    def value_and_vjp(*arguments):
        *primals, cotangent = arguments
        value, pull_back = jax.vjp(function, *primals)
        return value, pull_back(cotangent)

    return value_and_vjp


def last_level_cache_bytes() -> int:
    """Size of the largest cache of this CPU, as Linux reports it; 32 MiB where it does not."""
    sizes = [
        int(file.read_text("utf-8").strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


def copy_bandwidth(*, quick: bool = False, effort: Effort = QUICK) -> float:
    """Bytes per second, read plus written, of copying into a donated buffer touched before.

    Copying into a fresh output would also pay for its pages, and make the machine look slow.
    """
    cache = last_level_cache_bytes() if jax.default_backend() == "cpu" else ACCELERATOR_CACHE_BYTES
    num_bytes = QUICK_COPY_BYTES if quick else CACHE_MULTIPLE * cache
    source = jax.random.normal(jax.random.key(0), (num_bytes // 4,))
    target = jnp.ones_like(source)
    program = (
        jax.jit(lambda old, new: old.at[:].set(new), donate_argnums=0, keep_unused=True)
        .lower(target, source)
        .compile()
    )

    def call():
        nonlocal target
        target = jax.block_until_ready(program(target, source))

    return 2 * source.nbytes / measure_calls(call, effort=effort).median_s


def product_rate(dtype: str, *, quick: bool = False, effort: Effort = QUICK) -> float:
    """Multiplications and additions per second of a large square matrix product in ``dtype``."""
    kind = "accelerator" if jax.default_backend() != "cpu" else "quick" if quick else "cpu"
    size = PRODUCT_SIZES[kind]
    left, right = (
        jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in (0, 1)
    )
    return 2 * size**3 / measure(jnp.matmul, left, right, effort=effort).median_s


def device() -> str:
    """What computes: the accelerator's kind, or the CPU's name and number of threads."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def versions() -> str:
    """Versions of what was measured."""
    found = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", "flax", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def number(value: float | None, pattern: str) -> str:
    """``value`` as text, empty for None."""
    return "" if value is None else format(value, pattern)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header = (
        "op", "shape", "dtype", "mode", "implementation", "median ms", "IQR ms", "CPU ms",
        "temp MB", "GB moved", "share of copy", "GFLOP", "share of product",
        "vs reference", "vs PyTorch",
    )  # fmt: skip
    cells = [
        (
            row.op,
            row.shape,
            row.dtype,
            row.mode,
            row.implementation,
            number(row.median_ms, ".2f"),
            number(row.iqr_ms, ".2f"),
            number(row.cpu_ms, ".2f"),
            number(row.temporary_mb, ".1f"),
            number(row.moved_gb, ".4f"),
            number(row.copy_share, ".0%"),
            number(row.operations_g, ".4f"),
            number(row.rate_share, ".0%"),
            number(row.speedup_reference, ".2f"),
            number(row.speedup_pytorch, ".2f"),
        )
        for row in rows
    ]
    return markdown([header, *cells])


def save_json(file: Path, rows: Sequence[Any], *, command: str, **facts: Any) -> None:
    """Write the rows (dataclasses) with what is needed to read them later."""
    content = {"command": command, **facts, "rows": [dataclasses.asdict(row) for row in rows]}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
