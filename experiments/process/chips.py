"""Accelerators that are not at hand: what their data sheets say, and XLA's compiler for them.

XLA compiles for a TPU or an NVIDIA GPU on a machine that has none, if the compiler is installed:
``pip install "jax[tpu]"`` brings the one for TPUs, ``pip install --no-deps jax-cuda13-plugin
jax-cuda13-pjrt`` the one for GPUs, each in the version of JAX. The devices found here stand for
absent ones: programs are compiled for them, and nothing runs.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.experimental import topologies

from cmsad_jax.types import ConfigError, Device

GPUS_OF_A_HOST = 8
"""GPUs that are joined by NVLink; further ones are reached over the network."""

NETWORK_BYTES_PER_S = 50e9
"""Of each GPU to other hosts, one way: a network card of 400 Gb/s for each."""

_GRIDS = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
    256: "4x8x8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, by its maker's data sheet.

    Attributes:
        platform: what programs are lowered for.
        memory_bytes: of one chip.
        peak_per_s: operations of matrix products in bfloat16, dense.
        bandwidth_bytes_per_s: of its memory.
        link_bytes_per_s: of one chip to its neighbours, one way.
        slices: TPUs: name of the slice for a number of chips.
        facts: GPUs: what XLA has to know (``GpuTargetConfigProto``).
    """

    platform: Literal["tpu", "cuda"]
    memory_bytes: float
    peak_per_s: float
    bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    slices: Mapping[int, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def most(self) -> int:
        """The largest number of chips whose arrangement is known here."""
        return max(self.slices) if self.slices else 256

    def link(self, chips: int) -> float:
        """Bytes per second, one way, at which a chip reaches the others of ``chips``."""
        if self.platform == "cuda" and chips > GPUS_OF_A_HOST:
            return NETWORK_BYTES_PER_S
        return self.link_bytes_per_s


_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
}

_AMPERE = {
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "l2_cache_size": 41943040,
    "clock_rate_ghz": 1.41,
    "cuda_compute_capability": "{ major: 8 }",
    "name": "NVIDIA A100-SXM4-40GB",
}

CHIPS = {
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 819e9, 200e9, slices=_GRIDS),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 2765e9, 600e9, slices=_CUBES),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 1640e9, 400e9, slices=_GRIDS),
    "a100-40": Chip("cuda", 42506321920, 312e12, 1555e9, 300e9, facts=_AMPERE),
    "a100-80": Chip(
        "cuda",
        85100068864,
        312e12,
        2039e9,
        300e9,
        facts=_AMPERE | {"name": "NVIDIA A100-SXM4-80GB"},
    ),
    "h100": Chip(
        "cuda",
        84942979072,
        989e12,
        3352e9,
        450e9,
        facts=_HOPPER | {"name": "NVIDIA H100 80GB HBM3"},
    ),
    "h200": Chip(
        "cuda",
        151397597184,
        989e12,
        4800e9,
        450e9,
        facts=_HOPPER | {"name": "NVIDIA H200 141GB HBM3e"},
    ),
}
"""By the data sheets: Google Cloud's of TPU v5e, v5p, v6e; NVIDIA's of A100 SXM, H100 SXM, H200."""

_COMPILERS = {
    "tpu": ("libtpu", 'pip install "jax[tpu]=={0}"'),
    "cuda": (
        "jax_plugins.xla_cuda13",
        "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0}",
    ),
}


def has_compiler(platform: Literal["tpu", "cuda"]) -> bool:
    """Whether XLA's compiler for a platform is installed."""
    try:
        return importlib.util.find_spec(_COMPILERS[platform][0]) is not None
    except ModuleNotFoundError:
        return False


def absent_devices(name: str, count: int) -> list[Device]:
    """``count`` devices to compile for; this process then computes on the processor alone.

    Raises:
        ConfigError: for a chip or a number that is not known, or where the compiler is missing.
    """
    chip = CHIPS.get(name)
    if chip is None:
        raise ConfigError(f"chip must be one of {', '.join(CHIPS)}; got {name!r}. Use --chip=v5e.")
    uneven = chip.platform == "cuda" and count > GPUS_OF_A_HOST and count % GPUS_OF_A_HOST
    if not 1 <= count <= chip.most or uneven:
        raise ConfigError(
            f"the number of chips must be 1 to {chip.most}, of GPUs beyond a host a multiple of "
            f"{GPUS_OF_A_HOST}; got {count}. Use --chips=16."
        )
    if not has_compiler(chip.platform):
        install = _COMPILERS[chip.platform][1].format(jax.__version__)
        raise ConfigError(
            f"programs for {name} need its compiler, which is not installed. In an environment of "
            f"its own, use {install}"
        )
    jax.config.update("jax_platforms", "cpu")
    if chip.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        fitting = min(size for size in chip.slices if size >= count)
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{chip.slices[fitting]}"
        )
    else:
        hosts = max(count // GPUS_OF_A_HOST, 1)
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{hosts}x{count // hosts}",
            target_config=target_config(chip),
        )
    return list(topology.devices[:count])


def target_config(chip: Chip) -> str:
    """What XLA must know of a GPU that it cannot ask: a ``GpuTargetConfigProto`` as text."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": round(chip.bandwidth_bytes_per_s),
        "device_memory_size": round(chip.memory_bytes),
        **{key: value for key, value in chip.facts.items() if key != "name"},
    }
    lines = [
        f"  {key} {value}" if str(value).startswith("{") else f"  {key}: {value}"
        for key, value in device.items()
    ]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 28 patch: 1 }",
            f'device_description_str: "{chip.facts["name"]}"',
            "",
        ]
    )
