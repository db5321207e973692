"""What the wheel holds: the library and nothing else; and that it is enough for the examples."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = (
    "distil_two_encoders",
    "fusion_in_nnx",
    "four_modalities",
    "losses_under_shard_map",
)
NOT_REQUIRED = ("tensorflow_datasets", "grain", "nibabel", "SimpleITK", "tyro", "sklearn", "tqdm")
RUN_EXAMPLES = """
import json, runpy, sys
sys.path.insert(0, {site!r})
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import cmsad_jax
results = {{"home": cmsad_jax.__file__}}
for name in {names!r}:
    results[name] = runpy.run_path(name + ".py")["main"]()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cmsad_jax", "data_pipelines", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
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


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A folder outside the checkout that holds copies of the examples."""
    folder = tmp_path_factory.mktemp("outside")
    for name in EXAMPLES:
        shutil.copy(ROOT / "docs/examples" / f"{name}.py", folder)
    return folder


def run_examples(python: str, site: str, folder: Path, absent=()) -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    code = RUN_EXAMPLES.format(site=site, absent=absent, names=EXAMPLES)
    done = subprocess.run(
        [python, "-I", "-c", code],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_results(results: dict, site: str) -> None:
    assert results["home"].startswith(site), "the wheel's own code ran"
    losses = results["distil_two_encoders"]
    assert losses[-1] < 0.8 * losses[0]
    losses = results["fusion_in_nnx"]
    assert losses[-1] < 0.7 * losses[0]
    before, after = results["four_modalities"]
    assert after < 0.6 * before
    on_many, on_one = results["losses_under_shard_map"]
    assert on_many == pytest.approx(on_one, rel=1e-5)


def test_examples_run_outside_the_checkout_with_what_the_wheel_requires(wheel, outside):
    site = outside / "site"
    wheel.extractall(site)
    check_results(run_examples(sys.executable, str(site), outside, NOT_REQUIRED), str(site))


@pytest.mark.slow
def test_examples_run_where_only_the_wheel_is_installed(wheel, outside):
    environment = outside / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", str(wheel.filename)]
    subprocess.run(install, check=True, cwd=outside)
    check_results(run_examples(python, str(environment), outside), str(environment))
