"""All commands under one name: ``cmsad cv`` is ``python -m experiments.cv``.

``cmsad`` alone lists them. A command is run by its name and not imported before it is asked for, so
that the list is there without the packages of the extra ``experiments``.
"""

import difflib
import importlib.metadata
import runpy
import sys
from collections.abc import Sequence

from data_pipelines.process import put
from experiments.process.greeting import SILENT, say_start

COMMANDS = {
    "cv": ("experiments.cv", "cross-validation from files to a report"),
    "predict": ("experiments.predict", "predict new patients, with a run or an exported model"),
    "validate": ("data_pipelines.validate", "say what is wrong with a data set"),
    "build": ("data_pipelines.build", "build a large data set ahead of its runs"),
    "evaluate": ("experiments.evaluate", "metrics of predicted masks against labels"),
    "compare": ("experiments.compare", "paired differences between runs, and their mean"),
    "export": ("experiments.export", "pack a run into one file"),
    "report": ("experiments.report", "write the report of a run folder again"),
    "plan": ("experiments.plan", "plan a run from the data set and the device, and say why"),
    "fit": ("experiments.fit", "which batches and crops fit; a part of plan, by its old name"),
    "ablation": ("experiments.ablation", "every part of the method switched off, and baselines"),
    "missing_modalities": (
        "experiments.missing_modalities",
        "what the lack of each modality costs finished runs",
    ),
    "false_positives": (
        "experiments.false_positives",
        "how many false lesions of finished runs lie outside of the gland",
    ),
    "attention": ("experiments.attention", "where the attention of finished runs lies"),
    "voxel_baseline": ("experiments.voxel_baseline", "what single voxels can tell"),
    "reproduce": ("experiments.reproduce", "repeat a step that was not finite"),
}
"""Name, module and purpose of each command, those that everyone needs first."""

OWN = ("cmsad_jax", "data_pipelines", "experiments")


def overview() -> str:
    """What ``cmsad --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cmsad COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "cmsad COMMAND --help lists the options of one; cmsad cv alone shows all on a phantom.",
        ]
    )


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a command as ``python -m`` does.

    Raises:
        SystemExit: with the command's status; 2 for a name that is none, and where a package is
            not installed.
    """
    name = name.replace("-", "_")
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1) or ["--help"]
        sys.exit(
            _refused(
                f"the command must be one of {', '.join(COMMANDS)}; got {name!r}. "
                f"Use cmsad {nearest[0]}."
            )
        )
    module, _ = COMMANDS[name]
    sys.argv = [module, *arguments]
    if not any(word in SILENT for word in arguments):
        say_start(name)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing in OWN:
            raise
        sys.exit(
            _refused(
                f"cmsad {name} needs the packages of the extra experiments; got no package "
                f'{missing}. Use pip install "cmsad-jax[experiments]".'
            )
        )


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def main() -> None:
    """Command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        put(overview())
    elif arguments[0] == "--version":
        put(importlib.metadata.version("cmsad-jax"))
    else:
        run(arguments[0], arguments[1:])


if __name__ == "__main__":
    main()
