"""Files are written whole or not at all, and a fault leaves nothing beside them."""

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder
from data_pipelines.serving.splits import Folds
from experiments.process.storage import TEMPORARY
from tests.data_pipelines.fabricate import raw_case, write_folder


@pytest.mark.parametrize("name", ["a.json", "p.1.A.nii.gz", "b.nii", "plain"])
def test_a_file_appears_when_it_is_whole(tmp_path, name):
    path = tmp_path / "new" / name
    with atomic_file(path) as partial:
        partial.write_text("1", encoding="utf-8")
        assert not path.exists()
        assert TEMPORARY.fullmatch(partial.name)  # so that what a killed run leaves is removed
        assert partial.name.endswith(path.suffix)
    assert [(p.name, p.read_text("utf-8")) for p in path.parent.iterdir()] == [(name, "1")]


def test_a_fault_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    full_disk(monkeypatch)
    with (
        pytest.raises(OSError, match="cannot write: No space left") as raised,
        atomic_file(path) as partial,
    ):
        partial.write_text("new", encoding="utf-8")
    assert raised.value.filename == str(path)
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("a.json", "old")]


def full_disk(monkeypatch) -> None:
    """From now on a text is half written when the disk is full."""
    write_text = Path.write_text

    def half(self, data, *arguments, **keywords):
        write_text(self, data[: len(data) // 2], *arguments, **keywords)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)


def test_folds_on_a_full_disk_leave_nothing(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        Folds((("a",), ("b",))).save(tmp_path / "folds.json")
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_on_a_full_disk_is_not_built(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data", raw_case())
    write_info = Builder._write_info

    def on_a_full_disk(self):
        with monkeypatch.context() as patched:
            full_disk(patched)
            write_info(self)

    monkeypatch.setattr(Builder, "_write_info", on_a_full_disk)
    builder = Builder(config)
    with pytest.raises(OSError, match="No space left"):
        builder.prepare()
    assert not builder.is_prepared()
    assert list(Path(builder.data_dir).glob(".*")) == []


def test_a_user_without_a_home_is_asked_for_a_path(tmp_path, monkeypatch):
    def nobody(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    config = write_folder(tmp_path / "data", raw_case())
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert Builder(config).entries
    config = dataclasses.replace(config, cache=Path("~/.cache/cmsad_jax"))
    with pytest.raises(
        DataError, match=r"~ must stand for a home .* Give --data.cache a full path"
    ):
        Builder(config)
