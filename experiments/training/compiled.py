"""What a compiled program takes, read from XLA: memory, operations, bytes, collectives, copies.

None of it is measured. XLA's account of memory is exact for what it allocates itself; the work
space of libraries (cuDNN) comes on top. The time by the roofline is what the chip's data sheet
allows if operations and memory overlap completely and collectives not at all.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from cmsad_jax.modules.network import CMSAD
from cmsad_jax.training import TrainState
from experiments.process.chips import Chip
from experiments.settings.config import Config, window
from experiments.training.memory import Estimate, of_compiled

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
)  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "add-dependency",
}  # fmt: skip
_MOVES = {
    "copy", "copy-start", "copy-done", "transpose", "reshape", "pad", "slice", "concatenate",
    "broadcast", "convert", "dynamic-slice", "dynamic-update-slice", "select", "compare", "and",
    "bitcast-convert", "reverse", "fusion",
} | _FREE  # fmt: skip

_TYPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Account:
    """What one program takes on each device.

    Attributes:
        memory: arguments and results, and everything between.
        operations: by XLA's count; before it optimises where its compiler does not tell (GPU).
        accessed_bytes: read and written in memory; where the compiler does not tell (GPU), those of
            the operands and results of what is executed, fusions counted at their edges.
        collectives: bytes of each kind of communication between devices.
        gathers: elements that are fetched one by one.
        cycles: XLA's own estimate for each kind of work (TPU); gathers count as nothing in it.
    """

    memory: Estimate
    operations: float
    accessed_bytes: float
    collectives: Mapping[str, int]
    gathers: int
    cycles: Mapping[str, int]

    @property
    def copies(self) -> float | None:
        """Share of the estimated cycles that only move data; None where there is no estimate."""
        total = sum(self.cycles.values())
        return self.cycles.get("copy", 0) / total if total else None

    def roofline_s(self, chip: Chip, chips: int) -> float:
        """Least seconds for the program by the chip's data sheet."""
        compute = self.operations / chip.peak_per_s
        memory = self.accessed_bytes / chip.bandwidth_bytes_per_s
        return max(compute, memory) + self.communication_s(chip, chips)

    def communication_s(self, chip: Chip, chips: int) -> float:
        """Seconds between devices: a ring passes an all-reduced array on twice, others once."""
        if chips == 1:
            return 0.0
        passed = sum(
            size * (2 if kind == "all-reduce" else 1) for kind, size in self.collectives.items()
        )
        return passed * (chips - 1) / chips / chip.link(chips)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    rest: str

    @property
    def kind(self) -> str:
        """The opcode without the halves of an asynchronous pair."""
        return self.opcode.removesuffix("-start")

    def called(self, key: str) -> str | None:
        """The computation named by ``key``."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


def account(lowered: Lowered) -> Account:
    """Compile a program and read what came."""
    compiled = lowered.compile()
    memory = of_compiled(compiled)
    assert memory is not None, "every compiler of accelerators gives an account of memory"
    before, cost = (stage.cost_analysis() or {} for stage in (lowered, compiled))
    text = CompiledText(compiled.as_text() or "")
    return Account(
        memory=memory,
        operations=cost.get("flops") or before["flops"],
        accessed_bytes=cost.get("bytes accessed") or text.accessed_bytes(),
        collectives=text.collectives(),
        gathers=text.gathers(),
        cycles=text.cycles(),
    )


def num_bytes(shapes: str) -> int:
    """Bytes of the arrays that a type of HLO names: ``f32[2,3]`` has 24, tuples are summed."""
    return sum(
        _num_elements(sizes) * _BITS.get(kind, 0) // 8 for kind, sizes in _TYPE.findall(shapes)
    )


def _num_elements(sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count


def shapes_of_batch(
    config: Config, examples: int, *leading: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a run without its data; ``leading`` axes come before the examples."""
    space, count = window(config), len(config.data.modalities)
    kinds = {
        "image": ((*space, config.network.num_channels), jnp.float32),
        "label": (space, jnp.int32),
        "present": ((count,), jnp.bool_),
        "key": ((2,), jnp.uint32),
    }
    return {
        name: jax.ShapeDtypeStruct((*leading, examples, *shape), kind)
        for name, (shape, kind) in kinds.items()
    }


def shapes_of_state(config: Config) -> TrainState:
    """The state of a run's training without its arrays; nothing is computed or allocated."""
    network = CMSAD(config.network)
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    image = jnp.zeros((1, *window(config), config.network.num_channels))

    def fresh(key: jax.Array) -> TrainState:
        params = network.init(key, image)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return jax.eval_shape(fresh, jax.random.key(0))


class CompiledText:
    """A compiled module, by its computations."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            header = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header.group(2), [])
                if header.group(1):
                    self.entry = header.group(2)
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_Instruction(*found.groups()))

    def executed(self, name: str = "", times: int = 1) -> Iterator[tuple[str, _Instruction, int]]:
        """What runs: computation, instruction, and how often; loops as often as XLA knows."""
        name = name or self.entry
        for instruction in self.computations.get(name, ()):
            inner = None
            if instruction.opcode == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
                inner = instruction.called("body")
                if inner:
                    yield from self.executed(inner, times * (int(known.group(1)) if known else 1))
            elif instruction.opcode == "call" and (inner := instruction.called("to_apply")):
                yield from self.executed(inner, times)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = branches.group(1).split(",") if branches else []
                names += filter(
                    None, (instruction.called(f"{x}_computation") for x in ("true", "false"))
                )
                for branch in names:
                    yield from self.executed(branch.strip().lstrip("%"), times)
            yield name, instruction, times

    def opcodes(self, instruction: _Instruction) -> Counter[str]:
        """Opcodes that an instruction does, those within a fusion for it."""
        inside = instruction.called("calls") if instruction.opcode == "fusion" else None
        if inside is None:
            return Counter([instruction.kind])
        found: Counter[str] = Counter()
        for each in self.computations.get(inside, ()):
            found += self.opcodes(each)
        return found

    def accessed_bytes(self) -> int:
        """Bytes of operands and results of all that is executed."""
        results = {
            name: {each.name: num_bytes(each.result) for each in instructions}
            for name, instructions in self.computations.items()
        }
        total = 0
        for name, instruction, times in self.executed():
            if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                continue
            operands = instruction.rest.split(")", 1)[0]
            read = sum(results[name].get(x, 0) for x in re.findall(r"%([\w.\-]+)", operands))
            total += times * (read + results[name][instruction.name])
        return total

    def collectives(self) -> dict[str, int]:
        """Bytes that each kind of collective operation passes on, by its results."""
        found: dict[str, int] = defaultdict(int)
        for _, instruction, times in self.executed():
            if instruction.kind in _COLLECTIVES:
                size = num_bytes(instruction.result)
                if instruction.kind != "all-reduce" and instruction.opcode.endswith("-start"):
                    size //= 2  # operand and result
                found[instruction.kind] += times * size
        return dict(found)

    def gathers(self) -> int:
        """Elements that gathers fetch in slices of one."""
        total = 0
        for _, instruction, times in self.executed():
            for each in self._within(instruction):
                sizes = re.search(r"slice_sizes=\{([\d,]*)\}", each.rest)
                if each.opcode == "gather" and sizes and _num_elements(sizes.group(1)) == 1:
                    shapes = _TYPE.findall(each.result)
                    total += times * sum(_num_elements(size) for _, size in shapes)
        return total

    def _within(self, instruction: _Instruction) -> Iterator[_Instruction]:
        inside = instruction.called("calls") if instruction.opcode == "fusion" else None
        if inside is None:
            yield instruction
            return
        for each in self.computations.get(inside, ()):
            yield from self._within(each)

    def cycles(self) -> dict[str, int]:
        """XLA's estimate for convolutions (products too), collectives, copies, and all else."""
        found: dict[str, int] = defaultdict(int)
        for _, instruction, times in self.executed():
            estimate = re.search(r'"estimated_cycles":"?(\d+)', instruction.rest)
            if estimate is None:
                continue
            opcodes = self.opcodes(instruction)
            if instruction.kind in _COLLECTIVES:
                kind = "collective"
            elif opcodes["convolution"] or opcodes["dot"]:
                kind = "convolution"
            elif set(opcodes) <= _MOVES:
                kind = "copy"
            else:
                kind = "other"
            found[kind] += times * int(estimate.group(1))
        return dict(found)
