"""Write ``golden_<schema>.tar.xz``: a checkpoint as this version writes it, for later ones to read.

``python -m tests.faults.make_golden`` trains a fold of ``tests.faults.job.tiny`` for 2 steps. Make
a new one only together with a new schema; the older ones stay beside it.
"""

import json
import tarfile
import tempfile
from pathlib import Path

import jax

from data_pipelines.serving import loading
from experiments.prediction.windows import weights_sha256
from experiments.training.checkpoints import SCHEMA, load_params
from experiments.training.fold import Fold
from experiments.training.loop import train_folds
from experiments.training.programs import compile_programs
from tests.faults.job import tiny

GOLDEN = Path(__file__).with_name(f"golden_{SCHEMA}.tar.xz")


def main() -> None:
    """Train, and pack the fold."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        config = tiny(run, Path(name) / "cache", steps=2, checkpoint_every=1)
        source = loading.build(config.data)
        ids = source.case_ids
        programs = compile_programs(config, jax.devices()[:1])
        train_folds(config, programs, source, [Fold(0, ids[2:], ids[:2], run / "fold_0")])
        facts = {"weights": weights_sha256(load_params(run, 0)), "data": source.fingerprint}
        (run / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        with tarfile.open(GOLDEN, "w:xz") as archive:
            archive.add(run / "facts.json", "run/facts.json")
            last = "fold_0/checkpoints/last/00000002"
            archive.add(run / last, f"run/{last}")
    print(GOLDEN, GOLDEN.stat().st_size)


if __name__ == "__main__":
    main()
