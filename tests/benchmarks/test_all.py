"""One command for all benchmarks: its table, its file, its picture."""

import json
import sys
import types
from pathlib import Path

import pytest

from benchmarks import __main__ as everything

ROW = {"op": "op", "shape": "s", "dtype": "d", "mode": "m", "implementation": "i", "device": "x"}


@pytest.fixture
def parts(monkeypatch):
    """Two parts that write fixed rows, and record how they were called."""
    called = {}

    def part(name, rows):
        def main(arguments):
            called[name] = arguments[:-2]
            Path(arguments[-1]).write_text(json.dumps({"rows": rows}), encoding="utf-8")

        module = types.ModuleType(name)
        monkeypatch.setattr(module, "main", main, raising=False)
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)

    part("kernels", [ROW | {"median_ms": 1.25, "copy_share": 0.5}])
    part("train_step", [{"preset": "small", "compile_s": None, "parameters": 10}])
    monkeypatch.setattr(
        everything, "PARTS", {"kernels": (["--quick"], []), "train_step": ([], ["--x"])}
    )
    return called


def test_every_row_is_in_the_table_the_file_and_the_picture(parts, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("all.json", "all.png")}
    everything.main(["--quick", "--json", str(files["all.json"]), "--plot", str(files["all.png"])])
    assert parts == {"kernels": ["--quick"], "train_step": []}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[3].strip() for line in lines[2:]] == [
        "median_ms 1.25, copy_share 0.5",
        "parameters 10",
    ]
    assert lines[2].split("|")[2].strip() == "op s d m i"
    saved = json.loads(files["all.json"].read_text("utf-8"))
    assert saved["kernels"]["rows"][0]["copy_share"] == 0.5
    assert files["all.png"].read_bytes().startswith(b"\x89PNG")


def test_one_part_alone_and_in_full(parts):
    everything.main(["--parts", "train_step"])
    assert parts == {"train_step": ["--x"]}


def test_a_part_that_fails_costs_no_other(parts, tmp_path, monkeypatch, capsys):
    def fails(arguments):
        raise MemoryError("too large")

    monkeypatch.setattr(sys.modules["benchmarks.kernels"], "main", fails)
    with pytest.raises(SystemExit, match="failed, see above: kernels"):
        everything.main(["--json", str(tmp_path / "all.json")])
    assert "MemoryError: too large" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "all.json").read_text("utf-8"))) == ["train_step"]
