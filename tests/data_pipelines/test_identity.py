"""A built data set goes with the code that its builder imports, wherever that code stands."""

import shutil
from pathlib import Path

import pytest

from data_pipelines.building.identity import PACKAGE, Identity, code_sha256
from data_pipelines.config import DataConfig
from data_pipelines.nifti_folder import nifti_folder_dataset_builder as builder
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.phantom.phantom_dataset_builder import Builder as Phantom

FILE = Path(builder.__file__).relative_to(PACKAGE.parent)


def write(package: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def package(tmp_path) -> Path:
    """A builder, what it imports, what that imports, and a file that none of them reaches."""
    folder = tmp_path / "pipes"
    write(
        folder,
        {
            "builder": "from pipes import near\nfrom .wing import beside\n",
            "near": "def read():\n    from pipes.wing.far import turn\n    return turn()\n",
            "wing/__init__": "",
            "wing/far": "def turn():\n    return 'RAS'\n",
            "wing/beside": "import numpy\nimport pipes.deep\n",
            "deep": "SIDE = 1\n",
            "stranger": "A = 1\n",
        },
    )
    return folder


def digest(package: Path) -> str:
    return code_sha256(package / "builder.py", package)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wing/far", "def turn():\n    return 'LPS'\n"),
        ("wing/beside", "import numpy\nimport pipes.deep\nnumpy.seterr(all='raise')\n"),
        ("deep", "SIDE = 2\n"),
        ("wing/__init__", "import pipes.stranger\n"),
        ("builder", "from pipes import near\nfrom .wing import beside\nORDER = 1\n"),
    ],
)
def test_a_change_of_whatever_is_imported_counts(package, name, text):
    before = digest(package)
    write(package, {name: text})
    assert digest(package) != before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wing/far", '"""Which way."""\n\n\ndef turn():\n    """R."""\n    return ("RAS")  # x\n'),
        ("deep", 'SIDE = 1\n"""One or two."""\n'),
        ("stranger", "A = 2\n"),
    ],
)
def test_words_and_what_is_not_imported_do_not_count(package, name, text):
    before = digest(package)
    write(package, {name: text})
    assert digest(package) == before


def test_a_moved_function_is_followed(package):
    write(package, {"near": "from pipes.wing.other import read\n"})
    write(package, {"wing/other": "def read():\n    return 'RAS'\n"})
    before = digest(package)
    write(package, {"wing/other": "def read():\n    return 'LPS'\n"})
    assert digest(package) != before


def test_of_the_options_of_a_data_set_those_that_change_a_case_count():
    def digests(**options) -> tuple[str, str]:
        data_set = Phantom(DataConfig(phantom=PhantomOptions(num_cases=2, **options)))
        identity = Identity(data_set)
        return identity.of_all(), identity.of_case(data_set.entries[0])

    (all_, one), (other_all, other) = digests(), digests(seed=1)
    assert len({all_, one, other_all, other}) == 4
    larger = Identity(Phantom(DataConfig(phantom=PhantomOptions(num_cases=3))))
    assert larger.of_case(larger.data_set.entries[0]) == one
    assert larger.of_all() != all_


def test_a_real_builder_depends_on_its_geometry_and_not_on_the_loading(tmp_path):
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_sha256(tmp_path / FILE, copy)
    assert before == code_sha256(Path(builder.__file__))
    (loading,) = copy.rglob("loading.py")
    loading.write_text(loading.read_text("utf-8") + "\nMORE = 1\n", encoding="utf-8")
    assert code_sha256(tmp_path / FILE, copy) == before
    (geometry,) = [
        file for file in copy.rglob("*.py") if "def canonical(" in file.read_text("utf-8")
    ]
    geometry.write_text(
        geometry.read_text("utf-8").replace('"RAS"', '"LPS"').replace("RAS", "LPS"),
        encoding="utf-8",
    )
    assert code_sha256(tmp_path / FILE, copy) != before
