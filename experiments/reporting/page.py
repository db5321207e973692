"""The report's two pages from what a run folder holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.measuring.statistics import FEW_PATIENTS, few_patients_warning
from experiments.measuring.summary import summarise
from experiments.process.storage import read_json, write_text
from experiments.reporting.charts import (
    curve_chart,
    curve_names,
    detection_charts,
    fold_color,
    read_history,
    result_charts,
)
from experiments.reporting.pictures import pictures_of, viewer_of
from experiments.reporting.tables import (
    beside_table,
    best_table,
    case_table,
    count_table,
    curve_table,
    detection_table,
    flat_table,
    fold_table,
    folds_table,
    headline_table,
    timing_table,
)
from experiments.reporting.wording import (
    Table,
    class_label,
    curve_label,
    fold_name,
    interval,
    number,
    plural,
    volume,
)
from experiments.run_folder import read_metrics

CHECKPOINT_LABELS = {
    "last": "last training step",
    "ema": "moving average (EMA) of the weights, last training step",
}


DEFINITIONS = (
    (
        "Undefined Dice",
        "A case without foreground has no Dice: it is shown as \u2013 and never averaged in, "
        "neither as 0 nor as 1. Sensitivity, precision and surface distances are of positive cases "
        "too; negative cases are judged by their false-positive volume. The column Cases holds the "
        "number of cases for which a metric is defined; every mean is over these alone.",
    ),
    (
        "Missed cases",
        "A positive case with an empty prediction has Dice and sensitivity 0, but no precision, "
        "HD95 or ASSD. Those means leave it out; the penalised ones put the diagonal of the volume "
        "in its place, and surface Dice 0. The missed cases are counted as well.",
    ),
    (
        "Spread",
        "Standard deviations (n - 1) over cases, and over the means of the folds. Neither is a "
        "standard error or a confidence interval.",
    ),
    (
        "95 % interval",
        "BCa bootstrap of the mean, drawing patients with all of their cases. It covers chance in "
        "who was examined, not in training: that takes several seeds.",
    ),
    (
        "Frame",
        "Every metric is measured on the original T2W grid, after resampling and cropping were "
        "undone.",
    ),
    (
        "Surface distances",
        "Convention of the package surface-distance: surfaces through voxel corners, elements "
        "weighted by area. HD95 is the larger of the two directed 95th percentiles, ASSD the mean "
        "of the two directed average distances. MONAI and MedPy give other values.",
    ),
    (
        "False-positive volume",
        "Predicted volume outside the truth; on negative cases all that is predicted. Volume "
        "difference is predicted less true volume of positive cases.",
    ),
    (
        "Lesion detection",
        "By picai_eval with the lesion candidates of the PI-CAI baselines: a candidate finds a "
        "lesion from an IoU of 0.1 on; a case is as suspicious as its strongest candidate. PI-CAI "
        "score: mean of average precision (AP) and AUROC.",
    ),
    (
        "Calibration",
        "Expected calibration error (ECE): mean gap between probability and frequency over bins of "
        "equal width, weighted by size. Nearly all voxels lie in the lowest bin, hence the second "
        "figure without it.",
    ),
)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``report.md`` of a run folder; returns the HTML's path.

    ``metrics.json`` must be there; any other file may be missing, and the report then says so or
    leaves its section out.

    Raises:
        MissingDataError: the folder holds no ``metrics.json``.
        DataError: an earlier version wrote it, without the metrics of today.
    """
    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir)
    classes = metrics.get("classes") or list(metrics["mean"])
    facts = _facts(run_dir, metrics, classes)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    environment.policies["json.dumps_kwargs"] = {}  # modalities keep their order
    markdown, html = (environment.get_template(f"report.{kind}.j2") for kind in ("md", "html"))
    write_text(run_dir / "report.md", markdown.render(facts))
    room = PAGE_BYTES - len(html.render(facts | {"viewer": None}).encode()) - VIEWER_PROGRAM_BYTES
    viewer = viewer_of(run_dir, metrics, classes, room)
    write_text(run_dir / "report.html", html.render(facts | {"viewer": viewer}))
    return run_dir / "report.html"


PAGE_BYTES = 15_000_000


PICTURES_BYTES = 5_000_000


VIEWER_PROGRAM_BYTES = 50_000  # controls, script, and what JSON and HTML escape


def _markdown(table: Table) -> str:
    """The table in GitHub's Markdown, under a heading."""
    lines = [
        table.columns,
        ["---", *["---:"] * (len(table.columns) - 1)],
        *table.rows,
    ]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"## {table.title}\n\n{body}\n"


def _read_metrics(run_dir: Path) -> dict[str, Any]:
    metrics = read_metrics(run_dir)
    if "interval" not in metrics:  # written by an earlier version
        metrics |= summarise(metrics["metric_per_case"], [e["fold"] for e in metrics["per_fold"]])
    return metrics


def _facts(run_dir: Path, metrics: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Everything the two templates show but the viewer, which gets the room that is left."""
    target = metrics.get("target", classes[0])
    folds = _read_json(run_dir / "folds.json")
    fold_list = folds.get("folds", []) if isinstance(folds, dict) else folds
    names = folds.get("names", []) if isinstance(folds, dict) else []
    done = [entry["fold"] for entry in metrics["per_fold"]]
    num_folds = len(fold_list) or metrics.get("num_folds", len(done))
    history = read_history(run_dir)
    curves, unused = curve_names(history)
    environment = _read_json(run_dir / "environment.json")
    config = _read_json(run_dir / "config.json")
    return {
        "title": f"Cross-validation: {target} segmentation",
        "run": run_dir.resolve().name,
        "target": target,
        "started": environment.get("started"),
        "device": environment.get("device"),
        "checkpoint": CHECKPOINT_LABELS.get(
            metrics.get("checkpoint", ""), metrics.get("checkpoint", "not recorded")
        ),
        "rule": "the largest of the class probabilities"
        if len(classes) > 1
        else f"probability above {metrics.get('threshold', 'not recorded')}",
        "status": _status(done, num_folds, names),
        "complete": len(done) == num_folds,
        "warnings": _warnings(metrics, classes, names),
        "tiles": _tiles(metrics, classes),
        "headline": [headline_table(metrics, name) for name in classes],
        "counts": count_table(metrics, classes),
        "detection": detection_table(metrics),
        "detection_charts": detection_charts(metrics["detection"])
        if "detection" in metrics
        else [],
        "definitions": DEFINITIONS,
        "beside": beside_table(metrics, classes),
        "best": best_table(metrics, names),
        "per_fold": fold_table(metrics, classes, num_folds, names),
        "fold_colors": [
            (fold_name(fold, names), fold_color(fold)) for fold in (done or sorted(history))
        ],
        "result_charts": [
            chart
            for index, name in enumerate(classes)
            for chart in result_charts(metrics, name, f"r{index}")
        ],
        "curve_charts": [
            curve_chart(history, name, f"t{index}") for index, name in enumerate(curves)
        ],
        "curve_table": curve_table(history, curves, names),
        "unused_terms": [curve_label(name) for name in unused],
        "pictures": pictures_of(run_dir, metrics, classes, PICTURES_BYTES),
        "per_case": case_table(metrics, names),
        "timing": timing_table(metrics, environment, names),
        "folds_table": folds_table(fold_list, names),
        "folds_sha256": folds.get("sha256") if isinstance(folds, dict) else None,
        "config": flat_table("Configuration", config.get("config", config)),
        "data_fingerprint": config.get("data_fingerprint"),
        "environment": flat_table(
            "Environment", {key: value for key, value in environment.items() if key != "wall_s"}
        ),
    }


def _status(done: Sequence[int], num_folds: int, names: Sequence[str]) -> str:
    if not num_folds:
        return "Evaluated without folds."
    missing = [fold for fold in range(num_folds) if fold not in done]
    if not missing:
        return f"All {num_folds} folds are done."
    return (
        f"Incomplete: {len(done)} of {num_folds} folds are done; missing: "
        f"{', '.join(f'fold {fold_name(fold, names)}' for fold in missing)}. "
        "Every figure below is of the folds that are done."
    )


def _warnings(
    metrics: Mapping[str, Any], classes: Sequence[str], names: Sequence[str]
) -> list[str]:
    warnings = [
        f"No evaluated case holds any {class_label(name)}: Dice, sensitivity, precision and "
        "surface distances are undefined. Only false positives can be judged."
        for name in classes
        if not metrics["num_positive"][name]
    ]
    without = metrics["folds_without_positives"]
    if without and any(metrics["num_positive"].values()):
        listed = ", ".join(f"fold {fold_name(fold, names)}" for fold in without)
        warnings.append(f"No positive case in {listed}: Dice is undefined there.")
    for name in classes:
        num = metrics["num_patients"][name]["dice"]
        if 0 < num < FEW_PATIENTS:
            warnings.append(f"{class_label(name).capitalize()}: {few_patients_warning(num)}")
    return warnings


def _tiles(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, str]]:
    """The few figures that stand at the top, each with what it rests on."""
    tiles = []
    for name in classes:
        num = metrics["num_defined"][name]["dice"]
        tiles.append(
            {
                "label": f"Mean {class_label(name)} Dice",
                "value": number(metrics["mean"][name]["dice"], "dice"),
                "note": f"95 % interval {interval(metrics['interval'][name]['dice'], 'dice')}; "
                f"{plural(num, 'positive case')}"
                if num
                else "undefined: no positive case",
            }
        )
    name = classes[0]
    if len(classes) == 1:
        if metrics["num_positive"][name]:
            tiles.append(
                {
                    "label": "Missed",
                    "value": f"{metrics['num_missed'][name]} of {metrics['num_positive'][name]}",
                    "note": "positive cases with an empty prediction",
                }
            )
        if metrics["num_negatives"][name]:
            false = metrics["false_positives_on_negatives"][name]
            tiles.append(
                {
                    "label": "False positives",
                    "value": f"{false['num_cases']} of {metrics['num_negatives'][name]}",
                    "note": f"negative cases, {volume(false['mean_ml'])} on average",
                }
            )
    return tiles


def _read_json(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}
