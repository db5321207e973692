"""What the wheel holds: library, data and commands; and what of it needs which packages."""

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
PACKAGES = ("cmsad_jax", "data_pipelines", "experiments")
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


def test_wheel_holds_the_three_packages(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {*PACKAGES, "cmsad_jax-0.1.0.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_that_runs_or_is_shown(wheel, package):
    def wanted(file: Path) -> bool:
        return file.is_file() and "__pycache__" not in file.parts and file.name != "RESULTS.md"

    expected = {str(f.relative_to(ROOT)) for f in (ROOT / package).rglob("*") if wanted(f)}
    held = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert held == expected


def test_wheel_installs_the_command(wheel):
    text = wheel.read("cmsad_jax-0.1.0.dist-info/entry_points.txt").decode()
    assert text == "[console_scripts]\ncmsad = experiments.__main__:main\n"


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


def run_installed(site: Path, folder: Path, *arguments: str, absent=()) -> tuple[int, str, str]:
    """Status and output of ``cmsad`` from the wheel, outside the checkout."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        f"for name in {absent!r}:\n    sys.modules[name] = None\n"
        f"sys.argv = {['cmsad', *arguments]!r}\n"
        "from experiments.__main__ import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, encoding="utf-8", cwd=folder
    )
    return done.returncode, done.stdout, done.stderr


def test_command_of_the_wheel_runs_in_any_folder_and_names_its_extra(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    status, said, _ = run_installed(tmp_path / "site", tmp_path, "report", "--help")
    assert (status, "RUN" in said) == (0, True)
    absent = NOT_REQUIRED
    status, said, wrong = run_installed(tmp_path / "site", tmp_path, absent=absent)
    assert (status, wrong) == (0, "")
    assert "  cv  " in said
    status, _, wrong = run_installed(tmp_path / "site", tmp_path, "cv", absent=absent)
    assert status == 2
    assert 'pip install "cmsad-jax[experiments]"' in wrong


@pytest.mark.slow
def test_examples_run_where_only_the_wheel_is_installed(wheel, outside):
    environment = outside / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", str(wheel.filename)]
    subprocess.run(install, check=True, cwd=outside)
    check_results(run_examples(python, str(environment), outside), str(environment))
