"""What the documentation tells people to type can be typed, and the site builds."""

import dataclasses
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import cmsad_jax
from experiments.__main__ import COMMANDS as CMSAD
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.metrics import METRICS
from experiments.measuring.summary import summarise
from experiments.process.records import encode
from experiments.run_folder import Results
from experiments.settings.command_line import complete, parse
from experiments.settings.presets import PRESETS
from experiments.settings.stored import flatten, to_json

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "data_pipelines").rglob("*.md"),
        *ROOT.glob("*/RESULTS.md"),
    ]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAPER = ROOT / "docs/paper_settings.sh"

NOT_OF_THE_METHOD = {
    "accelerator",
    "compilation_cache",
    "deterministic",
    "data.allow_missing",
    "data.cache",
    "data.files",
    "data.labels",
    "data.lesions",
    "data.name",
    "data.path",
    "data.phantom.num_cases",
    "data.phantom.seed",
    "data.phantom2.num_cases",
    "data.phantom2.reader",
    "data.phantom2.seed",
    "data.prostate158.reader",
    "data.residency",
    "data.target",
    "distributed.coordinator",
    "distributed.launcher",
    "distributed.num_processes",
    "distributed.process_id",
    "folds",
    "folds_at_once",
    "group_by",
    "loss.ignored_label",  # follows from the data
    "network.dtype",
    "network.matmul_precision",
    "network.modalities",  # follow from the data
    "network.num_classes",
    "network.prior",
    "network.rematerialize",
    "output",
    "parallel",
    "plan",
    "predict.batch_size",
    "predict.figures",
    "preset",
    "profile",
    "report.max_mb",
    "train.accumulation",
    "train.checkpoint_every",
    "train.max_skipped",
    "train.read_threads",
    "train.steps_per_call",
}
"""Where and how a run is done, and on whose data: not the paper's to say."""


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return [block for language, block in BLOCK.findall(text) if language in languages]


def commands() -> list[tuple[str, str]]:
    """Every command: in a shell's code block or one without language, and inline."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [line for block in blocks(text, "", "bash") for line in block.splitlines()]
        lines += re.findall(r"`((?:python -m|make|cmsad) [^`]+)`", text)
        for line in lines:
            line = line.removeprefix("$ ").split("  #")[0].strip()
            if re.match(r"(python|make|pip|bash|cmsad) ", line) and "$" not in line:
                found.append((str(page.relative_to(ROOT)), line))
    return found


class ParsedError(Exception):
    """The command line was understood."""


def understood(module: str, arguments: list[str], monkeypatch) -> None:
    """Run a program up to the point where it has parsed its arguments."""
    import argparse

    parse_args, cli = argparse.ArgumentParser.parse_args, tyro.cli

    def stop_after(function):
        def stopping(*positional, **keywords):
            function(*positional, **keywords)
            raise ParsedError

        return stopping

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(parse_args))
    monkeypatch.setattr(tyro, "cli", stop_after(cli))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # runpy would keep the library's code with the tests' type checks as the code of every program.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(ParsedError):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("page", "command"), sorted({*commands()}))
def test_command_of_the_documentation_is_understood(page, command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "cmsad":
        words = ["python", "-m", CMSAD[words[1]][0], *words[2:]]
    if words[:3] == ["python", "-m", "pytest"]:
        files = [ROOT / word for word in words if word.startswith("tests/")]
        assert all(file.exists() for file in files)
        if "-k" in words and page != "CONTRIBUTING.md":  # whose recipes bring tests of their own
            assert words[words.index("-k") + 1] in files[0].read_text("utf-8")
    elif words[:3] == ["python", "-m", "venv"]:
        assert len(words) == 4
    elif words[:2] == ["python", "-m"]:
        package = ROOT / words[2].replace(".", "/")
        module = words[2] if package.with_suffix(".py").is_file() else f"{words[2]}.__main__"
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        if len(words) > 3:
            understood(module, words[3:], monkeypatch)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        understood(
            "experiments.cv", ["--preset=volume3d", *paper_settings(), *words[2:]], monkeypatch
        )
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    else:
        assert words[:2] in (["pip", "install"], ["pip", "download"])
        for extra in re.findall(r"\[([\w,]+)\]", command):
            project = (ROOT / "pyproject.toml").read_text("utf-8")
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", project, re.MULTILINE)


def test_commands_were_found():
    found = commands()
    assert len(found) > 25
    assert {page for page, _ in found} >= {"README.md", "docs/tutorial.md", "docs/predict.md"}


def paper_settings() -> list[str]:
    """The options in the template for the paper's values."""
    block = re.search(r"settings=\(\n(.*?)\n\)", PAPER.read_text("utf-8"), re.DOTALL)
    assert block
    return shlex.split(block[1], comments=True)


def test_paper_template_is_the_preset_and_names_every_field_of_the_method():
    config = parse(["--preset=volume3d", *paper_settings()])
    preset = PRESETS["volume3d"]
    loss = dataclasses.replace(preset.loss, teachers=("all",))  # the abstract knows of no other
    assert to_json(config) == to_json(complete(dataclasses.replace(preset, loss=loss)))
    named = {
        re.sub(r"\.\d+$", "", word.removeprefix("--")).replace("-", "_")
        for word in paper_settings()
        if word.startswith("--")
    }
    fields = flatten(dataclasses.asdict(PRESETS["volume3d"])).keys()
    assert fields - named == NOT_OF_THE_METHOD, (
        "a new field belongs into docs/paper_settings.sh, or into NOT_OF_THE_METHOD above"
    )


def test_paper_template_runs_what_it_holds(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", str(PAPER), "--data.path=mine"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    words = ["-m", "experiments.cv", "--preset=volume3d", *paper_settings(), "--data.path=mine"]
    assert done.stdout.splitlines() == words


def test_api_page_documents_the_whole_public_surface():
    page = (ROOT / "docs/api.md").read_text("utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert {*cmsad_jax.__all__} <= documented


def test_python_of_the_documentation_is_right_about_its_shapes(monkeypatch):
    """What is jitted is traced alone, since compiling it would take half a minute."""

    def traced(function):
        def zeros(*arguments):
            structure = []

            def leaves(*inner):
                flat, tree = jax.tree.flatten(function(*inner))
                structure.append(tree)
                return flat

            shapes = jax.eval_shape(leaves, *arguments)
            flat = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]
            return jax.tree.unflatten(structure[0], flat)

        return zeros

    monkeypatch.setattr(jax, "jit", traced)
    num_shapes = 0
    for page in ("README.md", "docs/concepts/attention_maps.md"):
        for block in blocks((ROOT / page).read_text("utf-8"), "python"):
            namespace: dict = {}
            exec(compile(block, page, "exec"), namespace)
            for expression, shape in re.findall(r"^(\S+\.shape)  # (\(.*\))$", block, re.MULTILINE):
                assert eval(expression, namespace) == eval(shape)
                num_shapes += 1
    assert num_shapes == 4


def test_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api/index.html").read_text("utf-8")
    assert "cross_modal_distillation_loss" in api
    assert "Attention of one modality teaches that of another" in api
    assert "Which modalities each example has" in api  # what an argument's type means
    results = (tmp_path / "experiments/RESULTS/index.html").read_text("utf-8")
    assert 'href="../../benchmarks/RESULTS/' in results
    assert "csPCa_lesion_delineations" in (tmp_path / "data_pipelines/picai/index.html").read_text(
        "utf-8"
    )


def test_every_metric_and_key_of_a_run_is_explained():
    page = (ROOT / "docs/run_folder.md").read_text("utf-8")
    cube = np.zeros((4, 8, 8), np.uint8)
    cube[1:3, 2:6, 2:6] = 1
    probability = cube[..., None].astype(np.float32)
    rows = measure_case("c", "p", 0, probability, cube, (3.0, 1.0, 1.0), Rule("lesion", 0.5))
    keys = {*encode(Results(summarise(rows, [0])))}
    keys |= {field.name for field in dataclasses.fields(Results)} - {"summary"}
    keys |= {*encode(rows[0])} - {*METRICS}
    assert not [name for name in sorted(keys) if f"`{name}`" not in page]
    table = [
        f"| `{name}` | {metric.meaning.replace('|', chr(92) + '|')} | {metric.undefined} |"
        for name, metric in METRICS.items()
    ]
    assert "\n".join(table) in page, "the table of the metrics must be:\n" + "\n".join(table)


def test_completion_completes(tmp_path):
    """The recipe of docs/commands.md, for one program, in bash itself."""
    script = f"""
source <({sys.executable} -m experiments.predict --tyro-print-completion bash \
  | sed 's/ python -m experiments/ experiments/')
COMP_WORDS=(experiments.predict --accelerator ""); COMP_CWORD=2
COMP_LINE="experiments.predict --accelerator "; COMP_POINT=${{#COMP_LINE}}
$(complete -p experiments.predict | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}"
"""
    (tmp_path / "script").write_text(script, encoding="utf-8")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/bash", str(tmp_path / "script")],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split() == ["auto", "cpu", "gpu", "tpu"]
