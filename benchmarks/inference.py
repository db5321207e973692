"""What prediction takes: memory against the size of the volume, and cases a minute from files.

``python -m benchmarks.inference`` predicts with a preset's network of random weights in five folds,
through an artifact and ``experiments.predict``, as a user would.

Memory: one case whose T2W has 24 x 320 x 320 voxels and one with 60 x 640 x 640, each in a process
of its own, with every image that ``--uncertainty`` writes. *Device* is XLA's account of the program
(arguments, result, temporaries) plus all other arrays that live on the device while windows run.
*Host* is the peak of the resident memory after compilation.

Whole volumes: all windows of one case on the reference grid, beside the same loop in PyTorch, from
the same weights and with the same result.

Speed: phantom cases written as NIfTI files, read, predicted and written again. Two shares are told:
that of the wall time in which the main thread is within the prediction of a case (cutting windows,
the program, weighing its results), and that of the processor time which is *not* spent by the
threads that read and write. Where these run on the cores that compute, as on CPUs, the first hides
what they take and the second shows it; on an accelerator it is the first that counts. Loading and
compiling the model lies outside of both, and within the time of the whole command.
"""

import argparse
import dataclasses
import io
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import pytorch, pytorch_network, timing
from cmsad_jax import export
from cmsad_jax.inference import sliding_window, window_starts
from cmsad_jax.modules.baselines import count_operations
from cmsad_jax.modules.network import CMSAD
from cmsad_jax.named_weights import flatten_weights, unflatten_weights
from cmsad_jax.training import init_state
from data_pipelines.case import Volume
from data_pipelines.phantom.anatomy import case_id_of
from data_pipelines.phantom.phantom import make_case
from data_pipelines.reading import volume_io
from experiments import predict
from experiments.exporting.artifact import describe
from experiments.exporting.model_card import model_card
from experiments.prediction.inputs import find_inputs, read_case
from experiments.prediction.models import Models, Prepared, data_config
from experiments.prediction.outputs import Extras, PredictionFolder
from experiments.prediction.windows import predict_window
from experiments.process.accelerator import select_accelerator
from experiments.settings.command_line import complete
from experiments.settings.config import Config, window
from experiments.settings.presets import PRESETS

VOLUMES = ((24, 320, 320), (60, 640, 640))
NUM_MEMBERS = 5


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Memory for one size of volume."""

    preset: str
    volume: str
    voxels: int
    device_mb: float
    host_peak_mb: float
    bytes_per_additional_voxel: float | None
    device: str
    versions: str


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """Many cases from files to files."""

    preset: str
    num_cases: int
    num_members: int
    wall_s: float
    cases_per_minute: float
    compute_share: float
    processor_share: float
    whole_s: float
    device: str
    versions: str


@dataclasses.dataclass(frozen=True)
class VolumeRow:
    """All windows of one volume, through the library and through a loop in PyTorch."""

    preset: str
    volume: str
    window: str
    dtype: str
    implementation: str
    median_s: float
    iqr_s: float
    cpu_s: float
    """Processor time of this process."""
    operations_g: float
    rate_share: float
    """Time of a matrix product of as many operations over the median."""
    speedup_pytorch: float | None
    device: str
    versions: str


def random_artifact(config: Config, target: Path | io.BytesIO) -> None:
    """An artifact of ``config`` with random weights of the network's own scale."""
    network = CMSAD(config.network)
    shape = (1, *window(config), len(config.data.modalities))
    image = jax.ShapeDtypeStruct(shape, np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    members = []
    for seed in range(NUM_MEMBERS):
        rng = np.random.default_rng(seed)
        members.append(
            {
                name: rng.normal(
                    scale=math.sqrt(2 / max(1, math.prod(leaf.shape[:-1]))), size=leaf.shape
                ).astype(np.float32)
                for name, leaf in flatten_weights(shapes).items()
            }
        )
    function = predict_window(config)
    program = export.export_program(
        lambda flat, windows, present: function(unflatten_weights(flat), windows, present),
        members[0],
        window=window(config),
        num_modalities=len(config.data.modalities),
        platforms=[{"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())],
    )
    names = [f"fold_{fold}" for fold in range(NUM_MEMBERS)]
    record = {"config": {"data": {"name": "none"}}, "data_fingerprint": "", "environment": {}}
    description = describe(config, members=names, provenance=record, metrics={}, license="none")
    export.save(
        target,
        description=description,
        programs={"predict": program},
        weights=members,
        card=model_card(description, sum(value.size for value in members[0].values())),
        license_text="none\n",
    )


def measure_volume(preset: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Bytes on device and host for one case of this size, in this process."""
    config = complete(PRESETS[preset])
    archive = io.BytesIO()
    random_artifact(config, archive)
    archive.seek(0)
    model = export.load(archive)
    facts = model.description
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_noise(root / "in/case", shape)
        model.compile()
        program, live = model.programs["predict"], [0]

        def watched(*arguments):
            result = program(*arguments)
            live[0] = max(live[0], sum(array.nbytes for array in jax.live_arrays()))
            return result

        watched_model = dataclasses.replace(model, programs={"predict": watched})
        (entry,) = find_inputs(root / "in", facts.modalities)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        data = data_config(facts)
        models = Models((watched_model,), (data,))
        computed = predict.compute(models, (Prepared(read_case(entry, data)),), Extras())
        PredictionFolder(root / "out").write_case(computed, facts, uncertainty=True)
        peak = _resident("VmHWM")
    windows = np.zeros((facts.batch_size, *facts.window, len(facts.modalities)), np.float32)
    present = np.ones((facts.batch_size, len(facts.modalities)), bool)
    analysis: Any = program.lower(model.weights[0], windows, present).compile().memory_analysis()  # pyright: ignore[reportFunctionMemberAccess]
    size = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {"device": size + analysis.temp_size_in_bytes + live[0], "host": peak}


def _write_noise(folder: Path, shape: tuple[int, int, int]) -> None:
    """T2W of ``shape`` over 160 mm in plane and 3 mm slices; ADC and HBV four times coarser."""
    rng = np.random.default_rng(0)
    for name, step in (("t2w", 1), ("adc", 4), ("hbv", 4)):
        size = (shape[0], shape[1] // step, shape[2] // step)
        affine = np.diag([160 / size[2], 160 / size[1], 3.0, 1.0])
        # write_nifti takes uint8 and float32; a scanner's files are of the former's kind, integers
        array = rng.integers(0, 255, size, np.uint8)
        volume_io.write_nifti(folder / f"{name}.nii", array, affine)


def _resident(field: str) -> float:
    """Bytes of a field of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith(field)))


def memory_rows(preset: str) -> list[MemoryRow]:
    """One row for each size, the second with the bytes for each voxel more than the first."""
    rows: list[MemoryRow] = []
    for shape in VOLUMES:
        command = [sys.executable, "-m", "benchmarks.inference", "--presets", preset, "--volume"]
        done = subprocess.run(
            [*command, *map(str, shape)], check=True, stdout=subprocess.PIPE, encoding="utf-8"
        )
        found = json.loads(done.stdout.splitlines()[-1])
        voxels = math.prod(shape)
        more = None
        if rows:
            more = (found["host"] - 1e6 * rows[0].host_peak_mb) / (voxels - rows[0].voxels)
        rows.append(
            MemoryRow(
                preset=preset,
                volume="x".join(map(str, shape)),
                voxels=voxels,
                device_mb=found["device"] / 1e6,
                host_peak_mb=found["host"] / 1e6,
                bytes_per_additional_voxel=more,
                device=timing.device(),
                versions=timing.versions(),
            )
        )
    return rows


def speed_row(preset: str, num_cases: int) -> SpeedRow:
    """Phantom cases as files, predicted by every member."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_artifact(complete(PRESETS[preset]), root / "model.cmsad")
        for index in range(num_cases):
            for name, volume in make_case(index).images.items():
                _write_volume(root / "in" / case_id_of(index) / f"{name}.nii.gz", volume)
        started = time.perf_counter()
        failed = predict.run(
            predict.PredictCommand(
                model=(root / "model.cmsad",), input=root / "in", output=root / "out", page=False
            )
        )
        whole = time.perf_counter() - started
        if failed:
            raise ArithmeticError(f"every case must be predicted; {failed} were not.")
        record = PredictionFolder(root / "out").read()
    return SpeedRow(
        preset=preset,
        num_cases=num_cases,
        num_members=NUM_MEMBERS,
        wall_s=record.wall_s,
        cases_per_minute=60 * num_cases / record.wall_s,
        compute_share=record.compute_s / record.wall_s,
        processor_share=1 - record.processor_beside_s / record.processor_s,
        whole_s=whole,
        device=timing.device(),
        versions=timing.versions(),
    )


def _write_volume(path: Path, volume: Volume) -> None:
    volume_io.write_nifti(path, volume.array.astype(np.float32), volume.affine)


def volume_operations(config: Config) -> float:
    """Floating-point operations of all windows of a case on the reference grid."""
    space, size = window(config), config.data.preprocess.size
    windows = math.prod(
        len(window_starts(whole, part, config.predict.overlap))
        for whole, part in zip(size[-len(space) :], space, strict=True)
    ) * (1 if len(space) == len(size) else size[0])
    return windows * count_operations(config.network, space)


def volume_rows(config: Config, effort: timing.Effort) -> list[VolumeRow]:
    """A case on the reference grid, all windows, without flips; PyTorch's once it agrees."""
    space, size = window(config), config.data.preprocess.size
    network = CMSAD(config.network)
    shape = (1, *space, len(config.data.modalities))
    state = init_state(network, optax.identity(), shape, key=jax.random.key(0))
    params = jax.device_get(state.params)
    image = np.random.default_rng(0).normal(size=(*size, shape[-1])).astype(np.float32)
    present = np.ones(shape[-1], bool)
    program = jax.jit(predict_window(config))
    options: dict[str, Any] = {
        "window": space,
        "overlap": config.predict.overlap,
        "batch_size": config.predict.batch_size,
    }

    def ours():
        return sliding_window(
            lambda windows, mask: program(state.params, windows, mask),
            image,
            present,
            num_classes=1,
            **options,
        )[..., 0]

    calls = {"library": ours}
    if pytorch.available():
        exact = config.network.dtype == "float32" and jax.default_backend() == "cpu"
        allowed = 1e-3 if exact else 3e-2
        try:
            theirs = pytorch_network.whole_volume(config, params, **options)
            error = float(np.abs(theirs(image) - ours()).max())
            if not error <= allowed:
                raise ArithmeticError(f"probabilities are {error:.1e} off, {allowed} allowed")
            calls["PyTorch eager"] = lambda: theirs(image)
        except Exception as error:
            print(f"left out: {config.preset} by PyTorch: {timing.first_line(error)}\n")
    measured = timing.measure_in_turn(calls, effort=effort)
    peer = measured.get("PyTorch eager")
    operations = volume_operations(config)
    rate = timing.product_rate(config.network.dtype, effort=effort)
    return [
        VolumeRow(
            preset=config.preset,
            volume="x".join(map(str, size)),
            window="x".join(map(str, space)),
            dtype=config.network.dtype,
            implementation=name,
            median_s=one.median_s,
            iqr_s=one.iqr_s,
            cpu_s=one.cpu_s,
            operations_g=operations / 1e9,
            rate_share=operations / one.median_s / rate,
            speedup_pytorch=None if peer is None else peer.median_s / one.median_s,
            device=timing.device(),
            versions=timing.versions(),
        )
        for name, one in measured.items()
    ]


def volume_table(rows: Sequence[VolumeRow]) -> str:
    """The rows as a Markdown table."""
    header = (
        "preset", "grid", "window", "dtype", "implementation", "median s", "IQR s", "CPU s",
        "GFLOP", "share of product", "vs PyTorch",
    )  # fmt: skip
    cells = [
        (
            row.preset,
            row.volume,
            row.window,
            row.dtype,
            row.implementation,
            f"{row.median_s:.2f}",
            f"{row.iqr_s:.2f}",
            f"{row.cpu_s:.2f}",
            f"{row.operations_g:.1f}",
            f"{row.rate_share:.0%}",
            timing.number(row.speedup_pytorch, ".2f"),
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """The rows as a Markdown table."""
    header = ("preset", "T2W volume", "device MB", "host peak MB", "bytes per additional voxel")
    cells = [
        (
            row.preset,
            row.volume,
            f"{row.device_mb:.1f}",
            f"{row.host_peak_mb:.0f}",
            timing.number(row.bytes_per_additional_voxel, ".1f"),
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """The rows as a Markdown table."""
    header = (
        *("preset", "cases", "folds", "wall s", "cases/min"),
        *("computing, of wall time", "of processor time", "whole command s"),
    )
    cells = [
        (
            row.preset,
            str(row.num_cases),
            str(row.num_members),
            f"{row.wall_s:.1f}",
            f"{row.cases_per_minute:.1f}",
            f"{row.compute_share:.1%}",
            f"{row.processor_share:.1%}",
            f"{row.whole_s:.1f}",
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print both tables, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--num-cases", type=int, default=50, help="phantom cases for the speed")
    parser.add_argument("--quick", action="store_true", help="few calls, 2 cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small"])
    parser.add_argument("--volume", type=int, nargs=3, help="measure memory for one size, as JSON")
    options = parser.parse_args(arguments)
    select_accelerator("auto")
    if options.volume:
        print(json.dumps(measure_volume(options.presets[0], tuple(options.volume))))
        return
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.inference {shlex.join(arguments)}".strip()

    print(f"{timing.device()}; {timing.versions()}\n`{command}`\n")
    effort = timing.QUICK if options.quick else timing.Effort()
    volumes = [
        row for preset in options.presets for row in volume_rows(complete(PRESETS[preset]), effort)
    ]
    print(volume_table(volumes) + "\n")
    memory = [row for preset in options.presets for row in memory_rows(preset)]
    print(memory_table(memory) + "\n")
    num_cases = 2 if options.quick else options.num_cases
    speed = [speed_row(preset, num_cases) for preset in options.presets]
    print(speed_table(speed))
    if options.json:
        timing.save_json(options.json, [*volumes, *memory, *speed], command=command)


if __name__ == "__main__":
    main()
