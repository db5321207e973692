"""The measuring itself: what is refused, what a row says. No test reads a clock."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels, timing
from benchmarks.shapes import Convolution
from benchmarks.timing import Effort, Foreign, Measurement, Operation

EFFORT = Effort(seconds=0.0, min_calls=2, max_calls=2, warm_up_calls=1)
X = np.linspace(-1.0, 1.0, 12, dtype=np.float32)


def operation(mode="forward", pytorch=None, **implementations) -> Operation:
    functions = {"reference": lambda x: x**2, **implementations}
    arguments = (X,)
    if mode == "forward+vjp":
        functions = {name: timing.with_vjp(function) for name, function in functions.items()}
        arguments = (X, np.ones_like(X))
    return Operation(
        "square", "12", "float32", mode, arguments, functions, "reference", 96, 1, 12, pytorch
    )


def wrong_gradient(x):
    """The value of a square with half of its gradient."""
    return x * jnp.asarray(X)


def left_out(given: Operation) -> tuple[set[str], list[str]]:
    """Names that are still timed, and why others are not."""
    agree, why = timing.agreeing(given)
    return {*agree.implementations, *(["pytorch"] if agree.pytorch else [])}, why


def test_a_right_implementation_is_timed():
    assert left_out(operation(right=lambda x: x * x)) == ({"reference", "right"}, [])


@pytest.mark.parametrize(
    "wrong", [lambda x: x**2 + 1e-3, lambda x: jnp.where(x > 0.9, jnp.nan, x**2)]
)
def test_a_wrong_implementation_is_left_out_and_named(wrong):
    rows, (why,) = timing.compare(
        operation(wrong=wrong), copy_bytes_per_s=1e9, operations_per_s=1e9, effort=EFFORT
    )
    assert [row.implementation for row in rows] == ["reference"]
    assert re.match(
        "left out: square 12 float32 forward by wrong: .* of the largest value off", why
    )


def test_a_wrong_gradient_is_left_out():
    assert "wrong" in left_out(operation(wrong=wrong_gradient))[0]  # its value is right
    assert left_out(operation("forward+vjp", wrong=wrong_gradient))[0] == {"reference"}


def test_an_implementation_that_refuses_the_shape_says_why():
    def refuses(x):
        raise NotImplementedError("takes multiples of 128; got 12.\nUse another.")

    agree, why = left_out(operation(refuses=refuses))
    assert agree == {"reference"}
    assert why == [
        "left out: square 12 float32 forward by refuses: takes multiples of 128; got 12."
    ]


def test_another_framework_is_held_to_the_same_value():
    right = Foreign(call=lambda: None, value=lambda: X**2)
    wrong = Foreign(call=lambda: None, value=lambda: X**3)
    assert left_out(operation("forward+vjp", pytorch=right))[0] == {"reference", "pytorch"}
    agree, (why,) = left_out(operation(pytorch=wrong))
    assert agree == {"reference"}
    assert "by pytorch" in why


def test_vjp_of_a_square():
    value, (gradient,) = timing.with_vjp(lambda x: x**2)(X, 3 * jnp.ones_like(X))
    np.testing.assert_allclose(value, X**2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 6 * X, rtol=1e-6)


def test_measure_counts_its_calls_and_the_temporary_memory():
    def needs_a_temporary(x):
        return jnp.sort(jnp.sin(x[:, None]) * jnp.cos(x[None, :]), axis=0).sum()

    result = timing.measure(needs_a_temporary, np.ones(256, np.float32), effort=EFFORT)
    assert result.num_calls == 2
    assert result.temporary_bytes is not None
    assert result.temporary_bytes >= 4 * 256 * 256


def test_calls_stop_at_the_upper_bound():
    calls = []
    effort = Effort(seconds=1e6, min_calls=1, max_calls=5, warm_up_calls=3)
    assert timing.measure_calls(lambda: calls.append(1), effort=effort).num_calls == 5
    assert len(calls) == 3 + 5


def test_effort_must_allow_a_call():
    with pytest.raises(ValueError, match="min_calls must be from 1 to max_calls; got 9 and 3"):
        Effort(min_calls=9, max_calls=3)


def test_calls_are_timed_in_turn():
    calls = []
    found = timing.measure_in_turn(
        {name: lambda name=name: calls.append(name) for name in "ab"},
        effort=Effort(seconds=0.0, min_calls=3, max_calls=3, warm_up_calls=1),
        temporary_bytes={"a": 7},
    )
    assert calls == ["a", "b", *"ab" * 3]
    assert (found["a"].temporary_bytes, found["b"].temporary_bytes) == (7, None)
    assert found["a"].num_calls == 3


def test_rows_follow_from_the_medians(monkeypatch):
    seconds = {"reference": 0.004, "fast": 0.001, "pytorch": 0.008}
    monkeypatch.setattr(
        timing,
        "measure_in_turn",
        lambda calls, **_: {
            name: Measurement(seconds[name], 0.0005, 2_000_000, 2, 0.002) for name in calls
        },
    )
    foreign = Foreign(call=lambda: None, value=lambda: X**2)
    rows, _ = timing.compare(
        operation(fast=lambda x: x * x, pytorch=foreign),
        copy_bytes_per_s=96e3,
        operations_per_s=48e3,
        effort=EFFORT,
    )
    assert [row.implementation for row in rows] == ["reference", "fast", "pytorch"]
    reference, fast, pytorch = rows
    assert (reference.speedup_reference, reference.speedup_pytorch) == (1.0, 2.0)
    assert (fast.speedup_reference, fast.speedup_pytorch) == (4.0, 8.0)
    assert pytorch.speedup_reference == 0.5
    assert fast.median_ms == 1.0
    assert fast.iqr_ms == 0.5
    assert fast.cpu_ms == 2.0
    assert fast.temporary_mb == 2.0
    assert fast.copy_share == 1.0  # 96 bytes in 1 ms where a copy moves 96 kB/s
    assert fast.rate_share == 0.25  # 12 operations in 1 ms where a product does 48,000 a second
    assert "jax" in fast.versions


def test_table_and_json_hold_every_row(tmp_path):
    rows, _ = timing.compare(operation(), copy_bytes_per_s=1e9, operations_per_s=1e9, effort=EFFORT)
    lines = timing.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    timing.save_json(tmp_path / "rows.json", rows, command="here", copy_gb_per_s=1.0)
    saved = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert saved["copy_gb_per_s"] == 1.0
    assert saved["rows"][0]["op"] == "square"
    assert saved["rows"][0]["speedup_pytorch"] is None


def test_rate_of_a_matrix_product(monkeypatch):
    monkeypatch.setitem(timing.PRODUCT_SIZES, "quick", 4)
    shapes = []

    def measure(function, *arguments, effort):
        shapes.append((function(*arguments).shape, arguments[0].dtype.name))
        return Measurement(2.0, 0, 0, 2, 2.0)

    monkeypatch.setattr(timing, "measure", measure)
    assert timing.product_rate("bfloat16", quick=True) == 2 * 4**3 / 2.0
    assert shapes == [((4, 4), "bfloat16")]


def test_operations_of_a_convolution_by_hand():
    shape = Convolution("x", (1, 4, 6, 2), (3, 3, 2, 5), (2, 2))
    forward, both = kernels.convolution(shape, "float32")
    # Kernels of 3 at 0 and 2 of 4 rows meet 2 and 3 of them, at 0, 2, 4 of 6 columns 2, 3 and 3.
    assert forward.operations == 2 * (2 + 3) * (2 + 3 + 3) * 2 * 5
    assert both.operations == 3 * forward.operations


def test_copy_moves_its_bytes_in_place(monkeypatch):
    monkeypatch.setattr(timing, "QUICK_COPY_BYTES", 4096)
    monkeypatch.setattr(
        timing,
        "measure_calls",
        lambda call, effort: (call(), call(), Measurement(2.0, 0, 0, 2, 2.0))[2],
    )
    assert timing.copy_bandwidth(quick=True, effort=EFFORT) == 4096.0
