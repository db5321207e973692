"""Fixtures shared by all tests."""

import importlib.metadata
import os
import signal
import tempfile
from pathlib import Path

import jaxtyping
import pytest

# Tests compile much and compute little. Set before JAX starts its backend; subprocesses inherit it.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it and abort
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Programs that tests start end with their terminal, also where the tests are run by nohup.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What one process compiles serves the others: those that run tests side by side, and those that
# tests start. Kept until this one ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

SHARED_DATA = Path(os.environ.get("CMSAD_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real patients and the answers of other software; absent on most machines."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no shared data at {SHARED_DATA}; set CMSAD_SHARED_DATA")
    return SHARED_DATA


@pytest.fixture
def without_type_checks():
    """As users call the library: tests check types at each call, and would be there first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
