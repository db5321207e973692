"""What CONTRIBUTING.md and the files of the project's root say is so."""

import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cmsad_jax
from tests.docs.test_documentation import ROOT
from tests.test_architecture import FLOORS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def pinned() -> dict[str, str]:
    """The releases of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def required() -> list[Requirement]:
    """What the library, its experiments and its artifacts need."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["experiments"], *extras["export"]]
    return [Requirement(line) for line in lines if not line.startswith("cmsad-jax")]


@pytest.mark.parametrize("requirement", required(), ids=lambda requirement: requirement.name)
def test_constraints_hold_a_release_that_is_accepted(requirement):
    version = pinned()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_constraints_name_no_place():
    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert re.findall(r"^(?!#).*(?:://| @ |^-)", text, re.MULTILINE) == []


def test_oldest_python_is_declared_once_and_all_versions_agree():
    prefix = "Programming Language :: Python :: 3."
    minors = [int(c.removeprefix(prefix)) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert minors == sorted(minors)
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert not SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minors[0] - 1}")
    assert PROJECT["version"] == cmsad_jax.__version__
    assert f"\nversion: {cmsad_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{cmsad_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_suite_of_the_versions_is_there():
    text = (ROOT / ".ci/versions").read_text("utf-8")
    suite = re.findall(r"^  (tests/[\w/.]+)(?:::(\w+))?", text, re.MULTILINE)
    assert len(suite) > 5
    for path, test in suite:
        assert (ROOT / path).exists()
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8")


def test_scripts_are_shell_that_parses():
    for name in ("run", "versions", "no_large_files"):
        subprocess.run(["bash", "-n", str(ROOT / ".ci" / name)], check=True)


def test_large_files_are_named(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(500_000))
    large.write_bytes(bytes(500_001))
    script = str(ROOT / ".ci/no_large_files")
    assert subprocess.run([script, small]).returncode == 0
    done = subprocess.run([script, small, large], capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"a committed file must have at most 500 kB; got 500001 bytes in {large}\. Keep .*\n",
        done.stdout,
    )


@pytest.mark.parametrize("package", FLOORS)
def test_layout_names_every_folder_in_the_order_of_imports(package):
    (table,) = re.findall(rf"^\| `{package}/` \|.*\n((?:\|.*\n)+)", CONTRIBUTING, re.MULTILINE)
    rows = [re.findall(r"`([\w.]+)/?`", row.split("|")[1]) for row in table.splitlines()[1:]]
    named = [[name.removesuffix(".py") for name in row] for row in rows]
    floor_of = {name: i for i, floor in enumerate(FLOORS[package]) for name in floor}
    floors = [[floor_of[name] for name in row] for row in named]
    assert all(len(set(row)) == 1 for row in floors)
    order = [row[0] for row in floors]
    assert order == sorted(order)
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    data_sets = {path.parent.name for path in (ROOT / package).glob("*/*_dataset_builder.py")}
    assert folders - data_sets <= {name for row in named for name in row}
