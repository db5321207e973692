"""Write ``golden/run_<schema>.tar.xz``: what runs leave as this version writes it, for later ones.

``python -m tests.experiments.make_golden`` makes a run of ``tests.experiments.tiny_run.tiny``, a
step that is not finite, and predictions. Make a new one only together with a new schema of a file
in it; the older ones stay beside it.
"""

import dataclasses
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from experiments import predict
from experiments.process.console import RunError
from experiments.run_folder import SCHEMA, RunFolder
from experiments.studies import cross_validation
from tests.data_pipelines.fabricate import write_folder
from tests.experiments.test_predict import case_of
from tests.experiments.tiny_run import poisoned, shared_programs, tiny
from tests.experiments.untrained_run import make_untrained_run, tiny_config

GOLDEN = Path(__file__).with_name("golden") / f"run_{SCHEMA}.tar.xz"


def main() -> None:
    """Make all of it, and pack what is small."""
    with tempfile.TemporaryDirectory() as name, shared_programs():
        root = Path(name)
        run = tiny(root / "run", root / "cache")
        cross_validation.run(run)
        stuck = dataclasses.replace(
            run,
            output=root / "stuck",
            folds=(0,),
            train=dataclasses.replace(run.train, max_skipped=2),
        )
        with pytest.MonkeyPatch.context() as patch:
            poisoned(patch, 1, 2)
            with pytest.raises(RunError):
                cross_validation.run(stuck)
        with np.load(RunFolder(root / "stuck").fold(0).not_finite(2)) as file:
            arrays = {name: file[name] for name in file.files}
        small = {k: v for k, v in arrays.items() if k == "facts" or v.nbytes <= 64}
        np.savez_compressed(root / "not_finite_00000002.npz", allow_pickle=False, **small)
        make_untrained_run(root / "untrained", tiny_config())
        write_folder(root / "in", case_of("a"), case_of("b", seed=1))
        (root / "in/b/adc.nii.gz").write_bytes(b"x")
        model, output = ("--model", str(root / "untrained")), ("--output", str(root / "out"))
        with pytest.raises(SystemExit):
            predict.main([*model, "--input", str(root / "in"), *output])
        shutil.copyfile(root / "out/predictions.json", root / "predictions.json")
        with tarfile.open(GOLDEN, "w:xz") as archive:
            for path in sorted((root / "run").rglob("*")):
                kept = path.suffix in (".json", ".csv") or path.parent.name == "masks"
                if kept and path.is_file() and "checkpoints" not in path.parts:
                    archive.add(path, path.relative_to(root))
            for path in (root / "predictions.json", root / "not_finite_00000002.npz"):
                archive.add(path, path.name)
    print(GOLDEN, GOLDEN.stat().st_size)


if __name__ == "__main__":
    main()
