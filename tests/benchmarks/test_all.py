"""One command for all benchmarks: its table, its file, its picture."""

import json
import sys
import types
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from benchmarks import __main__ as everything
from benchmarks import pictures

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
    found = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert list(found) == ["about", "train_step"]
    assert found["about"]["command"] == "python -m benchmarks"


def test_a_bar_beyond_the_scale_says_its_number():
    figure, axes = plt.subplots()
    rows = [ROW | {"copy_share": 0.5}, ROW | {"copy_share": 0.1, "rate_share": 3.456}]
    pictures.draw_shares(axes, rows, ["half", "beyond"])
    assert [bar.get_width() for bar in axes.patches] == [50, pictures.END]
    assert [text.get_text() for text in axes.texts] == ["346 % ▸"]
    assert axes.get_xlim() == (0, pictures.END)
    plt.close(figure)


def test_a_picture_says_what_it_is_of():
    of = pictures.account("python -m benchmarks") | {"commit": "0123456789abcdef-dirty"}
    assert pictures.title("Kernels", of) == (
        f"Kernels\n{of['device']}, {of['date'][:10]}, commit 0123456789abcd"
    )
    assert pictures.title("Kernels", of | {"commit": None}).endswith(of["date"][:10])
