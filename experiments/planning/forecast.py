"""What a run would take on chips that are not at hand: compiled for them, and not run."""

from cmsad_jax.types import ConfigError
from experiments.process.chips import CHIPS, absent_devices
from experiments.settings.config import Config
from experiments.training.compiled import Account, account, shapes_of_batch, shapes_of_state
from experiments.training.memory import GIB
from experiments.training.programs import compile_programs


def compiled_step(config: Config, name: str, chips: int) -> Account:
    """XLA's account of the train step of a configuration on so many chips of a kind.

    Raises:
        ConfigError: a chip that is not known or without its compiler, or ``pmap``.
    """
    if config.parallel != "jit":
        raise ConfigError(
            f"programs for absent chips are compiled under jit; got --parallel={config.parallel}. "
            "Use --parallel=jit."
        )
    step = compile_programs(config, absent_devices(name, chips)).step.step
    batch = shapes_of_batch(config, config.train.batch_size)
    traced = getattr(step, "trace")(shapes_of_state(config), batch)  # noqa: B009
    return account(traced.lower(lowering_platforms=(CHIPS[name].platform,)))


def in_words(config: Config, name: str, chips: int) -> str:
    """Memory, operations, bytes, and the least hours of all folds, each marked as not run."""
    found, chip = compiled_step(config, name, chips), CHIPS[name]
    seconds = found.roofline_s(chip, chips)
    compute = found.operations / chip.peak_per_s
    memory = found.accessed_bytes / chip.bandwidth_bytes_per_s
    passed = ", ".join(f"{k} of {n / 1e6:.1f} MB" for k, n in sorted(found.collectives.items()))
    hours = config.num_folds * config.train.steps * seconds / 3600
    return (
        f"compiled for {chips} x {name}, not run. A step on each chip: "
        f"{found.memory.bytes / GIB:.2f} of {chip.memory_bytes / GIB:.1f} GiB, "
        f"{found.memory.temporary_bytes / GIB:.2f} of them temporary; "
        f"{found.operations / 1e12:.3f} TFLOP, {found.accessed_bytes / 1e9:.1f} GB accessed"
        + (f"; {passed} between chips" if passed else "")
        + f".\nBy the data sheet at least {1e3 * seconds:.1f} ms a step "
        f"({1e3 * compute:.1f} of arithmetic, {1e3 * memory:.1f} of memory, "
        f"{1e3 * found.communication_s(chip, chips):.1f} between chips), so "
        f"{config.num_folds} folds of {config.train.steps} steps take {hours:.2f} h or more. Left "
        "out: work space of libraries (cuDNN), operations that do not reach the peak, input, "
        "start and prediction."
    )
