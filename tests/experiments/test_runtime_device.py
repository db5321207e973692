"""What a run asks of the device and of JAX beside computing."""

import jax
import jax.numpy as jnp
import pytest

from experiments.process.accelerator import keep_compiled, peak_memory_bytes, profiled
from experiments.training.programs import compiler_options


@pytest.fixture
def no_cache():
    """JAX without a compilation cache, as it is afterwards."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache")
def test_compiled_programs_are_kept_where_nobody_else_chose(tmp_path):
    keep_compiled(tmp_path / "ours")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "ours")
    keep_compiled(tmp_path / "other")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "ours")


def test_peak_memory_is_that_of_the_process_on_a_cpu():
    assert 10**7 < peak_memory_bytes(jax.devices("cpu")[0]) < 10**12


def test_a_trace_is_written_where_asked(tmp_path):
    with profiled(tmp_path / "trace"):
        jnp.ones(4).sum().block_until_ready()
    assert any((tmp_path / "trace").rglob("*.xplane.pb"))
    with profiled(None):
        pass


def test_deterministic_operations_are_asked_of_gpus_alone():
    options = compiler_options("gpu", deterministic=True)
    assert options == {"xla_gpu_deterministic_ops": True}
    # XLA refuses names that it does not know, on any platform.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2
    assert compiler_options("gpu", deterministic=False) is None
    assert compiler_options("cpu", deterministic=True) == compiler_options(
        "cpu", deterministic=False
    )
