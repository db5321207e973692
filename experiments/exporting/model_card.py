"""What a person should know before using an exported model."""

from collections.abc import Mapping, Sequence
from typing import Any

from cmsad_jax import export
from experiments.measuring.metrics import METRICS
from experiments.prediction.outputs import target_of_model


def classes_of(description: export.Description) -> tuple[str, ...]:
    """What is measured: the outputs, or what the user's lines make of them."""
    own = bool(description.labels)
    return target_of_model(description).classes if own else description.classes


def _scaled(grid: Mapping[str, Any]) -> str:
    """How intensities are scaled."""
    kept = ", ".join(grid.get("scales", ()))
    units = f", but for what keeps its unit ({kept}: centre and width)" if kept else ""
    return f"scaled to mean 0 and sd 1{units}"


def model_card(description: export.Description, num_parameters: int) -> str:
    """What a person should know before using the model, Markdown."""
    data = description.provenance["config"]["data"]
    environment = description.provenance["environment"]
    grid = description.preprocess
    low, high = grid["clip_percentiles"]
    classes = classes_of(description)
    of_what = "in images" if description.labels else "in prostate MRI"
    rows = [
        f"| {name} | {key} | {_figure(description, 'mean', name, key)} "
        f"| {_figure(description, 'sd', name, key)} "
        f"| {_figure(description, 'num_defined', name, key)} |"
        for name in classes
        for key, metric in METRICS.items()
        if metric.per_fold
    ]
    centre = "gland" if grid["centre"] == "gland" else "T2W image"
    rule = (
        f"a voxel above {description.threshold} belongs to the target"
        if len(description.classes) == 1
        else "a voxel belongs to the most probable class, background among them"
    )
    missing = "may be missing" if description.allow_missing else "must all be there"
    return f"""# Model card

Segments {", ".join(classes)} {of_what} from {", ".join(description.modalities)}
({missing}). **Research software, not a medical device: not for diagnosis or treatment.**

- **Model**: cross-modal self-attention distillation (CMSAD), a reconstruction from the abstract of
  arXiv 2011.03908; {num_parameters:,} weights for each of {len(description.members)} members
  ({", ".join(description.members)}), whose probabilities are averaged.
- **Input**: volumes resampled to {_times(grid["size"])} voxels (d h w) of
  {_times(grid["spacing_mm"])} mm around the centre of the {centre}, clipped to the percentiles
  {low:g} to {high:g}, {_scaled(grid)}. What lies outside that grid is not examined.
- **Output**: probabilities; {rule}.
- **Trained on**: data set `{data["name"]}`, fingerprint
  `{description.provenance["data_fingerprint"][:16]}`; commit `{environment.get("git_commit")}`,
  {environment.get("started", "date unknown")}, {environment.get("device", "device unknown")}.
- **Licence of the weights**: {description.license}.

## Cross-validated figures

Each case was measured by the member that had not seen it. The ensemble of all members has seen
every case of the training data: predictions on these are no test.

| class | metric | mean | sd | cases |
|---|---|---|---|---|
{chr(10).join(rows)}

## Use

```
python -m experiments.predict --model model.cmsad --input CASES --output PREDICTIONS
```

or, on arrays and with no other packages than jax, jaxtyping and flatbuffers,
`cmsad_jax.export.load("model.cmsad")`. The weights are `weights/*.safetensors` of this archive, a
zip file.
"""


def _figure(description: export.Description, statistic: str, name: str, metric: str) -> str:
    value = description.metrics.get(statistic, {}).get(name, {}).get(metric)
    if value is None:
        return "undefined"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
