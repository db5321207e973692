"""The benchmark of large reports, on a few small cases."""

import json

import pytest

from benchmarks import report
from tests.experiments.test_report_browser import CHROMIUM


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_size_and_times_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SHAPE", (20, 64, 256))
    report.main(["--cases", "6", "--opened", "2", "--max-mb", "3", "--json", str(tmp_path / "a")])
    figures = json.loads((tmp_path / "a").read_text("utf-8"))
    assert figures["cases"] == figures["cases_in_viewer"] == 6
    assert 0.5 < figures["page_mb"] < 3
    assert 0 < figures["opened_s"] < figures["first_slice_s"]
    assert 0 < figures["case_median_s"] <= figures["case_slowest_s"]
    assert "page_mb" in capsys.readouterr().out
