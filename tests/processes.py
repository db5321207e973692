"""Two processes of one program, as jax.distributed joins them over the loopback device."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping


def start_two(
    program: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start Python on ``program`` twice, on CPUs: its arguments are number, port, ``arguments``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), port, *arguments],
            env=environment or os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for number in range(2)
    ]
