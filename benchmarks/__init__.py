"""How fast: ``python -m benchmarks``."""

import os

# PyTorch and processes of their own compute on the same accelerator beside JAX, which would take
# three quarters of its memory at once. Heeded if said before JAX looks for devices.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
