"""Size of a large report, and how fast it opens in a browser: ``python -m benchmarks.report``.

A run folder of synthetic cases is made up, its page written, and opened in headless Chromium (the
package playwright, and a Chromium on the PATH): time until the page can be read, time until the
first slice is drawn, and the time from choosing a case to its first slice, over some of them.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.serving.splits import Folds
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.summary import summarise
from experiments.process.records import write_record
from experiments.reporting.page import write_report
from experiments.run_folder import SCHEMA, Results, RunFolder, RunRecord
from experiments.settings.config import ReportConfig

SHAPE = (20, 256, 256)
SPACING_MM = (3.0, 0.5, 0.5)
NUM_FOLDS = 5
DRAWN = "document.getElementById('viewer-panes').dataset.drawn"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--cases", type=int, default=300, help="cases of the run")
    parser.add_argument("--max-mb", type=float, default=20.0, help="size that the page keeps to")
    parser.add_argument("--opened", type=int, default=20, help="cases that are opened one by one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        make_run(run, options.cases)
        started = time.perf_counter()
        page = write_report(run, ReportConfig(options.max_mb))
        figures = {"cases": options.cases, "written_s": time.perf_counter() - started}
        figures |= {"page_mb": page.stat().st_size / 1e6, **open_in_browser(page, options.opened)}
    for name, value in figures.items():
        print(f"{name:<28} {value:.3g}" if isinstance(value, float) else f"{name:<28} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def make_run(run: RunFolder, num_cases: int) -> None:
    """Cases of smooth noise with a lesion in every other one; all of them kept for the viewer."""
    rng = np.random.default_rng(0)
    numbers = [range(fold, num_cases, NUM_FOLDS) for fold in range(NUM_FOLDS)]
    ids = [[f"case_{number:04d}" for number in of_fold] for of_fold in numbers]
    Folds(tuple(map(tuple, ids))).save(run.folds)
    coarse = rng.normal(size=(12, *SHAPE[:1], 33, 33)).astype(np.float32)
    rows = []
    for fold, names in enumerate(ids):
        run.fold(fold).figures.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            truth, probability = lesion(rng, positive=number % 2 == 0)
            rows += measure_case(
                name, name, fold, probability[..., None], truth, SPACING_MM, Rule("lesion", 0.5)
            )
            write_figure(run.fold(fold).figure(name), rng, coarse, truth, probability)
    results = Results(summarise(rows, range(NUM_FOLDS)), "lesion", ("lesion",), 0.5, "ema")
    run.write_results(results)
    config = {"data": {"name": "phantom", "modalities": ["t2w", "adc", "hbv"]}}
    write_record(run.config, RunRecord(config, "0"), schema=SCHEMA)


def lesion(rng: np.random.Generator, *, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and a probability that is shifted against it."""
    d, h, w = np.ogrid[tuple(slice(n) for n in SHAPE)]
    centre = rng.uniform(0.4, 0.6, 3) * SHAPE
    radius = rng.uniform(4, 9)

    def ball(shift: float) -> np.ndarray:
        z, y, x = (d - centre[0]) * 3, (h - centre[1] - shift) / 2, (w - centre[2]) / 2
        return np.sqrt(z**2 + y**2 + x**2) / radius

    probability = np.clip(1.5 - ball(rng.uniform(0, 8)), 0, 1) * rng.uniform(0.2, 1)
    return (ball(0) < 1).astype(np.uint8) * np.uint8(positive), probability.astype(np.float32)


def write_figure(
    file: Path,
    rng: np.random.Generator,
    coarse: np.ndarray,
    truth: np.ndarray,
    probability: np.ndarray,
) -> None:
    """What a run keeps of a case: structures of a few millimetres, and grain."""
    images = []
    for _ in range(3):
        field = coarse[rng.integers(len(coarse))]
        smooth = field.repeat(8, 1).repeat(8, 2)[:, : SHAPE[1], : SHAPE[2]]
        images.append(smooth + 0.2 * rng.normal(size=SHAPE).astype(np.float32) - truth)
    attention = rng.integers(0, 255, (SHAPE[0], 64, 64, 3, 2)).astype(np.uint8)
    np.savez(
        file,
        allow_pickle=False,
        image=np.stack(images, -1).astype(np.float16),
        modalities=np.array(["t2w", "adc", "hbv"]),
        truth=truth,
        probability=probability.astype(np.float16),
        attention=attention,
        spacing_mm=np.array(SPACING_MM),
    )


def open_in_browser(page: Path, num_opened: int) -> dict[str, object]:
    """Times in headless Chromium, in seconds."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto("about:blank")
        started = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="domcontentloaded")
        readable = time.perf_counter() - started
        tab.wait_for_function(f"{DRAWN} !== undefined", polling=10)
        drawn = time.perf_counter() - started
        count = tab.locator("#viewer-case option").count()
        times = [
            tab.evaluate(OPEN_CASE, index)
            for index in np.linspace(0, count - 1, min(num_opened, count)).astype(int).tolist()
        ]
        browser.close()
    return {
        "cases_in_viewer": count,
        "opened_s": readable,
        "first_slice_s": drawn,
        "case_median_s": statistics.median(times),
        "case_slowest_s": max(times),
    }


OPEN_CASE = """(index) => new Promise((resolve) => {
  const select = document.getElementById("viewer-case");
  const panes = document.getElementById("viewer-panes");
  const started = performance.now();
  select.value = index;
  select.dispatchEvent(new Event("change"));
  const look = () => {
    if ((panes.dataset.drawn || "").startsWith(`${index}/`)) {
      resolve((performance.now() - started) / 1000);
    } else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})"""


if __name__ == "__main__":
    main()
