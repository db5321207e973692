"""What pages and docstrings name is there: modules, attributes, files, commands, fusions."""

import ast
import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest

from cmsad_jax.modules.fusion import FusionConfig
from tests.docs.test_documentation import PAGES, ROOT
from tests.test_architecture import MODULES, PACKAGES, has_main

DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?![\w/])")


def docstrings(module: str) -> str:
    """All docstrings of a module, those below fields too, and its comments."""
    text = MODULES[module].read_text("utf-8")
    found = re.findall(r"#.*", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.append(str(node.value.value))
    return "\n".join(found)


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one; fields of a class count."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in MODULES:
            value = importlib.import_module(".".join(parts[:length]))
            break
    for part in parts[length:]:
        fields = {f.name: f.type for f in getattr(value, "__dataclass_fields__", {}).values()}
        if not hasattr(value, part) and part not in fields:
            return False
        value = getattr(value, part, fields.get(part))
    return True


def is_history(page: Path) -> bool:
    """Whether a page tells of what was, which need not be there any more."""
    return page.name == "CHANGELOG.md"


SOURCES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES if not is_history(page)
}
SOURCES |= {module: docstrings(module) for module in MODULES}
RECIPES = re.findall(r"^New file `([^`]+)`:$", SOURCES["CONTRIBUTING.md"], re.MULTILINE)
"""Files that the recipes create."""

CREATED = tuple(path.removesuffix(".py").replace("/", ".") for path in RECIPES)
NAMES = sorted(
    (where, name)
    for where, text in SOURCES.items()
    for name in {*DOTTED.findall(text)}
    if not name.startswith(CREATED)
)


@pytest.mark.parametrize(("where", "name"), NAMES)
def test_dotted_name_is_there(where, name):
    assert is_there(name), f"{where} names {name}"


def test_names_were_found_and_wrong_ones_would_be():
    assert len(NAMES) > 100
    assert DOTTED.findall("see `cmsad_jax.parallel.run`.") == ["cmsad_jax.parallel.run"]
    assert not is_there("cmsad_jax.apply")
    assert not is_there("experiments.runtime")
    assert not is_there("data_pipelines.config.DataConfig.colour")
    assert is_there("data_pipelines.config.DataConfig.preprocess")


@pytest.mark.parametrize("module", MODULES)
def test_class_of_another_module_is_there(module):
    """``case_files.CaseFiles`` in a docstring: a module of the project and a class in it."""
    homes: dict[str, list[str]] = {}
    for name in MODULES:
        homes.setdefault(name.rpartition(".")[2], []).append(name)
    foreign = {"jax", "numpy", "np", "jnp", "nn", "nib", "sitk", "torch", "optax", "struct"}
    for stem, name in re.findall(r"``(\w+)\.([A-Z][a-z]\w+)", docstrings(module)):
        if stem not in foreign:
            assert any(is_there(f"{home}.{name}") for home in homes.get(stem, [])), (stem, name)


@pytest.mark.parametrize("kind", typing.get_args(typing.get_type_hints(FusionConfig)["kind"]))
def test_kind_of_fusion_is_explained(kind):
    assert f"`{kind}`" in (ROOT / "docs/concepts/fusion.md").read_text("utf-8")


def test_every_choice_of_a_fusion_is_an_option_of_the_page_or_its_help():
    page = (ROOT / "docs/concepts/fusion.md").read_text("utf-8")
    options = re.findall(r"--network\.fusion\.([\w-]+)", page)
    assert {option.replace("-", "_") for option in options} <= {
        field.name for field in dataclasses.fields(FusionConfig)
    }


def test_every_command_is_listed():
    page = (ROOT / "docs/commands.md").read_text("utf-8")
    commands = {m.removesuffix(".__main__") for m in MODULES if has_main(m)}
    assert {"experiments.cv", "data_pipelines.validate", "benchmarks"} <= commands
    assert [name for name in sorted(commands) if f"`python -m {name}" not in page] == []


def test_every_file_that_a_page_names_is_there():
    """Paths in backticks that begin with a folder of the project."""
    folders = "|".join(("docs", "tests", *PACKAGES))
    missing = []
    for page, text in SOURCES.items():
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
            if not Path(ROOT, path).exists():
                missing.append((page, path))
    assert [found for found in missing if found[1] not in RECIPES] == []
