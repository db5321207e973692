"""The short form of ``make faults``: what needs no process of its own and no compiled network."""

import ast
import json
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from cmsad_jax.training import TrainState
from data_pipelines.faults import DataError
from data_pipelines.reading.case_files import check_ids
from data_pipelines.serving import loading
from data_pipelines.serving.splits import make_folds
from experiments.run_folder import Best, FoldFolder, FoldSummary
from experiments.studies import cross_validation
from experiments.training.checkpoints import Checkpoints
from experiments.training.fold import Fold, write_history
from tests.faults import commands, hostile
from tests.faults.digest import digest
from tests.faults.job import tiny
from tests.test_export import TRICKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Configuration, and cases of equal shapes whose images all differ."""
    folder = tmp_path_factory.mktemp("cases")
    config = tiny(folder / "run", folder / "cache")
    return config, loading.build(config.data)


def bright(params, windows, present):
    """A network whose mask is a function of its image alone."""
    return (np.asarray(windows)[..., :1] > 0.2).astype(np.float32)


def stages(params, windows, present):
    """Attention of two stages of every modality."""
    return np.repeat(np.abs(windows), 2, -1)


PROGRAMS = SimpleNamespace(predict=bright, attention=stages, modality_weights=None)


def expected_masks(config, source, folder: Path) -> dict[str, np.ndarray]:
    """The mask of each case, made alone and one after the other."""
    of_fold = FoldFolder(folder)
    for case_id in source.case_ids:
        cross_validation.predict_and_measure(config, PROGRAMS, {}, source[case_id], 0, of_fold)
    return read_masks(folder)


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    """Masks by the id in the header, which must be that of the file's name."""
    masks = {}
    for path in (folder / "masks").iterdir():
        image = nib.load(path)
        case_id = image.header["descrip"].item().decode()
        assert path.name == f"{case_id}.nii.gz"
        masks[case_id] = np.asarray(image.dataobj)
    return masks


def test_masks_cannot_be_exchanged_between_cases(cases, tmp_path, monkeypatch):
    config, source = cases
    alone = expected_masks(config, source, tmp_path / "alone")
    assert len({mask.tobytes() for mask in alone.values()}) == len(source)
    assert all(mask.any() for mask in alone.values())
    rng, lock = random.Random(0), threading.Lock()
    read = type(source).__getitem__

    def slow_read(self, case_id):
        with lock:
            delay_s = rng.uniform(0, 0.02)
        time.sleep(delay_s)
        return read(self, case_id)

    monkeypatch.setattr(type(source), "__getitem__", slow_read)
    original = loading.eval_cases
    monkeypatch.setattr(
        loading,
        "eval_cases",
        lambda source, ids: original(source, ids, num_threads=8),
    )
    monkeypatch.setattr(cross_validation, "train_folds", trained)
    folds = make_folds(source.info, num_folds=2)
    together = {}
    group = [
        Fold(i, folds.training(i), folds.validation[i], tmp_path / f"fold_{i}") for i in range(2)
    ]
    cross_validation.run_group(config, PROGRAMS, source, group)
    for fold in group:
        directory = fold.directory
        found = read_masks(directory)
        assert sorted(found) == sorted(fold.validation)
        together |= found
        for row in FoldFolder(directory).read_results().metric_per_case:
            volume_ml = found[row.case_id].sum() * voxel_ml(source[row.case_id])
            assert row.volume_predicted_ml == pytest.approx(volume_ml)
    writers = tmp_path / "writers"
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(
                lambda case_id: cross_validation.predict_and_measure(
                    config, PROGRAMS, {}, source[case_id], 0, FoldFolder(writers)
                ),
                source.case_ids,
            )
        )
    for masks in (together, read_masks(writers)):
        assert masks.keys() == alone.keys()
        for case_id, mask in masks.items():
            np.testing.assert_array_equal(mask, alone[case_id])


def trained(config, programs, source, folds, rest):
    """What ``train_folds`` leaves and returns, without training."""
    for fold in folds:
        write_history(fold.directory / "history.csv", [{"step": 1.0, "loss": 1.0}])
    return [({}, FoldSummary(1.0, 1.0, 1.0, 1.0, 1.0, 0, Best())) for _ in folds]


def voxel_ml(case) -> float:
    return abs(np.linalg.det(case.original_affine[:3, :3])) / 1000


def test_hostile_names_and_archives_are_refused(tmp_path):
    assert [text for text in hostile.results(tmp_path / "hostile", 1000) if text] == []
    assert not (tmp_path / "hostile" / "touched").exists()


def test_every_trick_of_strangers_can_be_made_and_is_refused(tmp_path, without_type_checks):
    results = commands.strangers(tmp_path / "strangers", len(TRICKS))
    assert len(results) == len(TRICKS) >= 55
    assert not [text for text in results if text]


def test_ids_that_differ_in_case_alone_are_refused():
    texts = [problem.text for problem in check_ids(["Case1", "case1", "b"])]
    assert len(texts) == 2
    assert "must differ in more than upper and lower case; got 'Case1' and 1 like it" in texts[0]


@pytest.mark.parametrize("ending", hostile.ENDINGS)
def test_dataset_json_cannot_name_files_elsewhere(tmp_path, ending):
    with pytest.raises(DataError, match=r'must give one of .* as "file_ending"; got'):
        hostile.refuse_ending(ending, tmp_path)


def test_no_package_loads_a_pickle():
    for package in ("cmsad_jax", "data_pipelines", "experiments", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & names, file
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    assert isinstance(node.value, ast.Constant), file
                    assert node.value.value is False, file


def test_digest_notices_every_change_but_times(tmp_path):
    """The harness would see a bit that differs, a file too many, and one that is missing."""
    run, places = tmp_path / "run", tmp_path / "again"
    fold = run / "fold_0"
    for name in ("masks", "cases", "figures", "tensorboard", "checkpoints/last/.00000003.tmp"):
        (fold / name).mkdir(parents=True)
    for name in ("masks/a.nii.gz", "cases/a.json", "figures/a.npz", "tensorboard/x"):
        (fold / name).write_text("1", encoding="utf-8")
    facts = {"metric_per_case": [{"dice": 0.25}], "fold_summaries": {"0": {"train_s": 1.0}}}
    (run / "metrics.json").write_text(json.dumps(facts), encoding="utf-8")
    (run / "metrics.csv").write_text("case_id,dice\na,0.25\n", encoding="utf-8")
    (fold / "history.csv").write_text("step,loss,examples_per_s\n1,0.5,3.0\n", encoding="utf-8")
    (run / "report.md").write_text(
        "Run `run`, started\n| Dice | 0.25 |\n| output | here |\n\n## Environment\n| started | 1 |",
        encoding="utf-8",
    )
    (run / "report.html").write_text(
        '<p>1 s</p><img src="data:image/png;base64,AAAA">', encoding="utf-8"
    )
    config = {"config": {"output": "here", "data": {"cache": "here", "name": "phantom"}}}
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (run / ".lock").write_text("process 1", encoding="utf-8")
    reference = digest(run)
    assert digest(run) == reference

    def changed(name: str, old: str, new: str) -> set[str]:
        """Names of what the digest of a copy with this change tells otherwise."""
        shutil.rmtree(places, ignore_errors=True)
        shutil.copytree(run, places)
        file = places / name
        if new:
            text = file.read_text("utf-8") if file.exists() else ""
            assert old in text
            file.write_text(text.replace(old, new) if old else new, encoding="utf-8")
        else:
            file.unlink()
        found = digest(places)
        return {key for key in reference | found if reference.get(key) != found.get(key)}

    for name, old, new in (
        ("metrics.json", "1.0", "2.0"),
        ("fold_0/history.csv", "3.0", "4.0"),
        ("fold_0/tensorboard/x", "1", "2"),
        ("report.md", "here", "there"),
        ("report.md", "started | 1", "started | 2"),
        ("report.html", "1 s", "2 s"),
        ("config.json", "here", "there"),
        (".lock", "1", "2"),
    ):
        assert changed(name, old, new) == set(), name
    for name, old, new in (
        ("metrics.json", "0.25", "0.26"),
        ("metrics.csv", "0.25", "0.26"),
        ("fold_0/history.csv", "0.5", "0.6"),
        ("fold_0/masks/a.nii.gz", "1", "2"),
        ("fold_0/cases/a.json", "1", "2"),
        ("fold_0/figures/a.npz", "1", ""),
        ("fold_0/masks/b.nii.gz", "", "1"),
        ("fold_0/.a.12.tmp", "", "1"),
        ("report.md", "0.25", "0.26"),
        ("report.html", "AAAA", "AAAB"),
        ("config.json", "phantom", "picai"),
    ):
        assert changed(name, old, new) == {name}, name
    shutil.rmtree(fold / "checkpoints")
    assert reference.keys() - digest(run).keys() == {"fold_0/checkpoints/last/.00000003.tmp"}


def test_digest_notices_every_array_of_a_checkpoint(tmp_path):
    config = tiny(tmp_path / "run", tmp_path / "cache")

    def hashed(change: float = 0.0, **progress) -> str:
        folder = tmp_path / f"run_{change}_{len(progress)}"
        state = TrainState(
            step=np.int32(3),
            params={"a": np.ones(2)},
            average={"a": np.ones(2)},
            opt_state=({"a": np.array([1.0, 2.0 + change])},),
        )
        kept = Checkpoints(folder / "fold_0" / "checkpoints", config)
        kept.save("last", state, progress={"history": [], "train_s": 1.0} | progress)
        kept.close()
        return digest(folder)["fold_0 last"]

    assert hashed() == hashed(train_s=2.0)
    assert hashed() != hashed(change=2.0**-52 * 2)
    assert hashed() != hashed(skipped=1)
