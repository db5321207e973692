"""What is planned for: the devices at hand, or a chip that is not, by its figures."""

import dataclasses
import os
from collections.abc import Sequence

from cmsad_jax.types import ConfigError, Device
from experiments.process.chips import CHIPS as COMPILED_FOR
from experiments.training.memory import GIB, limit_bytes


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        platform: cpu, gpu or tpu.
        kind: name of the chip.
        memory_gib: of each device, as far as JAX may use it; of a CPU that of the machine.
        count: devices.
        lanes: channels that a chip works on at once; fewer are padded to so many.
        at_hand: whether programs can be compiled for it here.
    """

    platform: str
    kind: str
    memory_gib: float
    count: int = 1
    lanes: int = 8
    at_hand: bool = False

    @property
    def is_cpu(self) -> bool:
        """Whether time is scarcer than memory."""
        return self.platform == "cpu"


CHIPS: dict[str, Target] = {
    "t4": Target("gpu", "t4", 16),
    "v100-16": Target("gpu", "v100-16", 16),
    "v100-32": Target("gpu", "v100-32", 32),
    "rtx3090": Target("gpu", "rtx3090", 24),
    "rtx4090": Target("gpu", "rtx4090", 24),
    "l4": Target("gpu", "l4", 24),
    "l40s": Target("gpu", "l40s", 48),
    "v4": Target("tpu", "v4", 32, lanes=128),
    **{
        name: Target("gpu", name, chip.memory_bytes / GIB)
        if chip.platform == "cuda"
        else Target("tpu", name, chip.memory_bytes / GIB, lanes=128)
        for name, chip in COMPILED_FOR.items()
    },
}
"""Memory of chips by their makers' data sheets; GPUs fill channels to 8, TPUs to 128."""

CPU_SHARE = 0.5
"""Part of a machine's memory that a run on its CPU may take: others work there too."""


def absent(name: str, memory_gib: float | None = None, count: int = 1) -> Target:
    """``count`` chips of the table.

    Raises:
        ConfigError: the table does not have it, or there is none.
    """
    if count < 1:
        raise ConfigError(f"a plan needs a chip or more; got {count}. Use --chips=1.")
    if name not in CHIPS:
        raise ConfigError(
            f"a chip must be one of {', '.join(CHIPS)}; got {name!r}. Use --chip=h100, or one of "
            "about the same memory."
        )
    chip = dataclasses.replace(CHIPS[name], count=count)
    return chip if memory_gib is None else dataclasses.replace(chip, memory_gib=memory_gib)


def at_hand(devices: Sequence[Device], memory_gib: float | None = None) -> Target:
    """The devices of this machine, all alike."""
    first = devices[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(first.platform) or first.platform
    limit = limit_bytes(first)
    if memory_gib is None:
        memory_gib = CPU_SHARE * _machine_gib() if limit is None else limit / GIB
    return Target(
        platform,
        first.device_kind,
        round(memory_gib, 1),
        len(devices),
        lanes=128 if platform == "tpu" else 8,
        at_hand=True,
    )


def _machine_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
