"""The first minutes on an accelerator, with parts that take no time."""

import json

from benchmarks import accelerator
from benchmarks.accelerator import Part

ROWS = """
import json, sys
print("| op | ms |"); print("|---|---|"); print("| copy | 3 |")
row = {"preset": "small", "variant": "full", "crop": "8x8", "dtype": "float32"}
rows = [row | {"examples_per_s": 2}]
open(sys.argv[1], "w").write(json.dumps({"rows": rows}))
"""


def module(folder, monkeypatch, name, text):
    (folder / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return name


def test_each_part_costs_no_other(tmp_path, monkeypatch):
    works = module(tmp_path, monkeypatch, "works", ROWS)
    fails = module(tmp_path, monkeypatch, "fails", "raise SystemExit('the reason')")
    hangs = module(
        tmp_path, monkeypatch, "hangs", "import time\nprint('waiting', flush=True)\ntime.sleep(60)"
    )
    parts = (
        Part("hangs", 0.1, (), (hangs,)),
        Part("fails", 0.5, (), (fails,)),
        Part("absent", 0.5, (), (works,), needs="no_such_package"),
        Part("train_step", 1.0, (), (works, "{json}")),
    )
    folder = tmp_path / "out"
    outcomes = accelerator.run(folder, tiny=True, minutes=0.5, parts=parts)
    assert [one.status for one in outcomes] == [
        "stopped after 3 s",
        "failed with status 1",
        "left out: no_such_package is not installed",
        "passed",
    ]
    found = json.loads((folder / "accelerator.json").read_text("utf-8"))
    assert found["device"]
    assert found["parts"][3]["rows"][0]["examples_per_s"] == 2
    section = (folder / "accelerator.md").read_text("utf-8")
    assert "| copy | 3 |" in section, "the table of a part that passed"
    assert "the reason" in section, "what a part that failed said"
    assert "`python -m works out/train_step.json`" in section
    assert (folder / "accelerator.png").stat().st_size > 10_000


def test_parts_name_commands_that_there_are():
    for part in accelerator.PARTS:
        for arguments in (part.arguments, part.tiny):
            assert accelerator._is_installed(arguments[0])
