"""The dependency rules of the layout, checked on fresh processes and on the source."""

import ast
import graphlib
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cmsad_jax

ROOT = Path(__file__).parents[1]
PACKAGES = ("cmsad_jax", "data_pipelines", "experiments", "benchmarks")
SUBMODULES = sorted(
    module.name for module in pkgutil.walk_packages(cmsad_jax.__path__, prefix="cmsad_jax.")
)
DATA_SETS = tuple(
    sorted(file.parent.name for file in ROOT.glob("data_pipelines/*/*_dataset_builder.py"))
)
FLOORS = {
    "data_pipelines": (
        (
            *("faults", "config", "case", "files", "modalities", "targets", "process"),
            *("progress", "short_help"),
        ),
        ("reading",),
        ("preparing",),
        ("building",),
        ("serving",),
        DATA_SETS,
        ("command_line",),
        ("build", "validate"),
    ),
    "experiments": (
        ("settings",),
        ("process",),
        ("measuring",),
        ("run_folder",),
        ("prediction",),
        ("training",),
        ("planning",),
        ("exporting", "reporting"),
        ("studies",),
        (
            *(
                "__main__",
                "ablation",
                "attention",
                "compare",
                "cv",
                "evaluate",
                "export",
                "false_positives",
                "fit",
                "missing",
            ),
            *("missing_modalities",),
            *("plan", "predict", "report", "reproduce", "voxel_baseline"),
        ),
    ),
}
"""Files and folders of a package from the lowest to the commands: imports go to lower floors alone,
and so between no two of one floor, but for the plain files on the lowest, and for a data set that
draws on another one."""

TIMED_AS_A_WHOLE = {"benchmarks.inference imports experiments.predict"}
"""The one command that a benchmark runs from its arguments to its files."""

HEAVY = ("tensorflow_datasets", "tensorflow", "grain", "nibabel", "SimpleITK", "tyro")


COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("experiments", "data_pipelines")
    for file in (ROOT / package).glob("*.py")
    if "__main__" in file.read_text("utf-8")
)
SLOW = (
    *("tensorflow_datasets", "grain", "orbax.checkpoint", "nibabel", "SimpleITK", "PIL"),
    *("scipy.ndimage", "scipy.stats", "sklearn", "picai_eval", "surface_distance"),
    *("matplotlib", "jinja2", "tensorboardX", "apache_beam"),
)
"""Packages that take long to load together; none is needed to read a command line."""


def loaded_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh process that ran one statement."""
    code = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert not done.returncode, done.stderr
    return set(json.loads(done.stdout))


def imports(file: Path) -> set[str]:
    """First components of every absolute import in a file, nested ones too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


READ_A_COMMAND_LINE = """
import contextlib, io, json, runpy, sys
loaded = {}
for command in COMMANDS:
    for option in ("--help", "--no-such-option"):
        sys.argv, said = [command, option], io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            with contextlib.suppress(SystemExit):
                runpy.run_module(command, run_name="__main__")
        assert "--help" in said.getvalue(), (command, option, said.getvalue())
    loaded[command] = sorted({*SLOW, "jax"} & {*sys.modules})
print(json.dumps(loaded))
"""


def test_help_and_refused_options_load_nothing_slow():
    assert len(COMMANDS) > 12, "commands are found"
    code = f"COMMANDS, SLOW = {COMMANDS}, {SLOW}\n{READ_A_COMMAND_LINE}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert not done.returncode, done.stderr
    expected = {name: ["jax"] if name.startswith("experiments") else [] for name in COMMANDS}
    expected["experiments.__main__"] = []  # before all others of its package
    assert json.loads(done.stdout) == expected


def modules_of(*packages: str) -> dict[str, Path]:
    """Every module of these packages by its dotted name."""
    found = {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules_of(*PACKAGES)


def imported(module: str) -> Iterator[tuple[str, str]]:
    """What a module imports of the project, nested imports too: module, and name in it if any."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (node.module, alias.name)


IMPORTS = {module: list(imported(module)) for module in MODULES}


@pytest.fixture(scope="module")
def loaded_by_library() -> set[str]:
    return loaded_after("import " + ", ".join(SUBMODULES))


@pytest.mark.parametrize("package", HEAVY)
def test_library_loads_no_file_or_command_line_package(loaded_by_library, package):
    assert "cmsad_jax.modules.network" in loaded_by_library  # the process did import it
    assert package not in loaded_by_library


def test_library_loads_orbax_only_as_far_as_flax_does(loaded_by_library):
    def orbax(names):
        return {name for name in names if name.split(".")[0] == "orbax"}

    by_flax = loaded_after("import flax.linen, flax.struct, optax, jax")
    assert orbax(loaded_by_library) <= orbax(by_flax)


def test_import_of_the_package_loads_neither_jax_nor_a_submodule():
    names = loaded_after("import cmsad_jax")
    assert "cmsad_jax" in names
    assert "jax" not in names
    assert not {name for name in names if name.startswith("cmsad_jax.")}


def test_losses_load_no_network():
    names = loaded_after("import cmsad_jax; cmsad_jax.dice_loss")
    assert "cmsad_jax.losses.segmentation" in names
    assert "cmsad_jax.modules.network" not in names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("cmsad_jax", {"data_pipelines", "experiments", "benchmarks", "orbax", "tests"}),
        ("data_pipelines", {"jax", "jaxlib", "flax", "cmsad_jax", "experiments", "benchmarks"}),
        ("experiments", {"benchmarks", "tests"}),
    ],
)
def test_no_file_imports_against_the_arrows(package, forbidden):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): imports(file) & forbidden for file in files}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("package", FLOORS)
def test_every_file_and_folder_has_its_floor(package):
    inside = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")}
    assert {name for floor in FLOORS[package] for name in floor} == inside


def floor_of(module: str) -> int:
    """Floor of a module; a data set's options lie beside its builder, and below everything."""
    package, name = module.split(".")[:2]
    if package == "data_pipelines" and module.endswith(".options"):
        return -1
    return next(i for i, floor in enumerate(FLOORS[package]) if name in floor)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_to_lower_floors_alone(package):
    against = set()
    for module, targets in IMPORTS.items():
        for target, _ in targets:
            if not (module.startswith(f"{package}.") and target.startswith(f"{package}.")):
                continue
            lower = floor_of(target) < floor_of(module)
            beside = floor_of(target) == floor_of(module)
            beside &= floor_of(module) == 0 or module.split(".")[1] in DATA_SETS
            same_folder = module.split(".")[1] == target.split(".")[1]
            if not (lower or beside or same_folder):
                against.add(f"{module} imports {target}")
    assert against == set()


def test_nothing_imports_a_command():
    commands = {f"{package}.{name}" for package in FLOORS for name in FLOORS[package][-1]}
    commands |= {name for name in MODULES if name.startswith("benchmarks.") and has_main(name)}
    assert {"experiments.cv", "data_pipelines.build", "benchmarks.kernels"} <= commands
    found = {
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target, _ in targets
        if target in commands
    }
    assert found == TIMED_AS_A_WHOLE


def has_main(module: str) -> bool:
    """Whether a module is run with ``python -m``."""
    return '__name__ == "__main__"' in MODULES[module].read_text("utf-8")


def test_imports_make_no_circle():
    graph = {module: {target for target, _ in targets} for module, targets in IMPORTS.items()}
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_no_private_name_is_used_in_another_module():
    found = set()
    for module, targets in IMPORTS.items():
        found |= {f"{module}: {name} of {target}" for target, name in targets if is_private(name)}
        known = {target.rpartition(".")[2] for target, name in targets if not name}
        for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                value = node.value
                if isinstance(value, ast.Name) and value.id in known:
                    found.add(f"{module}: {value.id}.{node.attr}")
    assert found == set()


def is_private(name: str) -> bool:
    """Whether a name is for its own module alone."""
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_folders_at_the_top(package):
    assert (ROOT / package / "__init__.py").is_file()


def test_every_file_says_what_it_holds_by_its_name():
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert [file for p in PACKAGES for file in (ROOT / p).rglob("*.py") if file.name in vague] == []


LONGEST = 60
"""Lines of a function that are read at a glance, without its docstring."""

KEPT_WHOLE = {
    "cmsad_jax.inference.sliding_window": "one loop and what it needs, read from top to bottom",
    "cmsad_jax.parallel.parallelize": "the same four functions under jit and pmap, side by side",
    "tests.faults.test_faults.test_digest_notices_every_change_but_times": "one run folder and a "
    "list of what may and may not change in it",
}
"""Functions that are longer, and why they are not split."""


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its name on, without its docstring."""

    def span(node: ast.stmt) -> int:
        return (node.end_lineno or node.lineno) - node.lineno + 1

    has_docstring = ast.get_docstring(function) is not None
    return span(function) - (span(function.body[0]) if has_docstring else 0)


def test_functions_are_short_but_for_those_that_are_kept_whole():
    longer = {
        f"{module}.{node.name}"
        for module, file in modules_of(*PACKAGES, "tests").items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and num_lines(node) > LONGEST
    }
    assert longer == {*KEPT_WHOLE}


def test_text_files_are_written_and_read_as_utf8_whatever_the_locale():
    said = {"read_text": 1, "write_text": 2}  # with the encoding by its place
    without = [
        f"{module}:{node.lineno}"
        for module, file in modules_of(*PACKAGES, "tests").items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if len(node.args) < said.get(node.func.attr, 0)
        if all(word.arg != "encoding" for word in node.keywords)
    ]
    assert without == []


@pytest.mark.parametrize("name", cmsad_jax.__all__)
def test_public_name_resolves_and_is_listed(name):
    assert getattr(cmsad_jax, name).__name__ == name
    assert name in dir(cmsad_jax)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cmsad_jax' has no attribute 'dice_los'"):
        cmsad_jax.dice_los  # noqa: B018


@pytest.mark.parametrize("module_name", ["cmsad_jax", *SUBMODULES])
def test_everything_public_has_a_docstring(module_name):
    module = importlib.import_module(module_name)
    is_empty_package = hasattr(module, "__path__") and not Path(str(module.__file__)).read_text(
        encoding="utf-8"
    )
    undocumented = [] if module.__doc__ or is_empty_package else [module_name]
    for name, value in vars(module).items():
        defined_here = getattr(value, "__module__", None) == module_name
        if name.startswith("_") or not defined_here:
            continue
        # a dataclass without a docstring is given its signature for one
        documented = value.__doc__ and not value.__doc__.startswith(f"{name}(")
        if (inspect.isclass(value) or inspect.isfunction(value)) and not documented:
            undocumented.append(f"{module_name}.{name}")
    assert undocumented == []
