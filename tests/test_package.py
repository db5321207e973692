"""What the wheel holds: the library and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cmsad_jax", "data_pipelines", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(
            "the wheel does not build; if packages are missing, run: "
            f"pip install -e '.[dev]' 'setuptools>=77'\n{done.stdout}{done.stderr}"
        )
    (file,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_the_library_alone(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"cmsad_jax", "cmsad_jax-0.1.0.dist-info"}


def test_wheel_holds_every_module_and_the_type_marker(wheel):
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "cmsad_jax").rglob("*.py")}
    held = {name for name in wheel.namelist() if name.startswith("cmsad_jax/")}
    assert held == expected | {"cmsad_jax/py.typed"}


def test_wheel_requires_jax_flax_optax_and_jaxtyping_only(wheel):
    metadata = Parser().parsestr(wheel.read("cmsad_jax-0.1.0.dist-info/METADATA").decode())
    required = [name for name in metadata.get_all("Requires-Dist", []) if "extra ==" not in name]
    assert {name.split(">")[0] for name in required} == {"jax", "flax", "optax", "jaxtyping"}
    assert metadata["License-Expression"] == "Apache-2.0"
