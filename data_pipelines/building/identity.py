"""What the stored cases of a data set depend on: settings, the user's files, and code.

The digest of the code follows the imports of the builder's file through this package, wherever the
code is moved to, and reads what it does: comments, docstrings and layout change nothing.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.building.protocol import DataSet, Entry, listing_files
from data_pipelines.files import expanded
from data_pipelines.reading.file_checks import files_of

PACKAGE = Path(__file__).parents[1]
HEAD_BYTES = 2**12
"""So much of every file is read for its identity, besides size and time: its header."""
MAX_WHOLE_BYTES = 2**22
"""Labels and masks of up to this size are read whole, as they are the files that are edited."""

_HASHED_FIELDS = ("target", "labels", "modalities", "allow_missing", "preprocess")


class Identity:
    """By what the stored cases of a data set are known: equal digests mean equal cases."""

    def __init__(self, data_set: DataSet):
        self.data_set = data_set
        config = dataclasses.asdict(data_set.data_config)
        own = {name: config[data_set.name][name] for name in data_set.hashed_options}
        self._everywhere = {
            "settings": {name: config[name] for name in _HASHED_FIELDS} | own,
            "code": code_sha256(Path(inspect.getfile(type(data_set)))),
        }

    def of_all(self) -> str:
        """sha256 of all that the stored cases depend on."""
        return self._sha256({"cases": [self._state(entry) for entry in self.data_set.entries]})

    def of_case(self, entry: Entry) -> str:
        """sha256 of all that one stored case depends on."""
        return self._sha256({"name": self.data_set.name, "case": self._state(entry)})

    def _sha256(self, facts: dict[str, object]) -> str:
        text = json.dumps({**facts, **self._everywhere}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _state(self, entry: Entry) -> tuple[object, ...]:
        """What is stored of a case before its files are read, and the state of these."""
        with listing_files():
            files = [
                (name, *self._file_state(file, label=name in ("label", "gland")))
                for name, path in self.data_set.files(entry).items()
                for file in files_of(path)
            ]
        metadata = sorted(getattr(entry, "metadata", {}).items())
        problems = getattr(entry, "problems", ())
        errors = [problem.text for problem in problems if problem.level == "error"]
        return entry.case_id, getattr(entry, "patient_id", ""), metadata, errors, sorted(files)

    def _file_state(self, path: Path, *, label: bool) -> tuple[str, int, int, str]:
        root = expanded(self.data_set.data_config.path or Path(), "--data.path")
        name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        try:
            state = path.stat()
        except FileNotFoundError:
            return name, -1, -1, ""  # a link to nowhere, named with the other problems of its case
        return name, state.st_size, state.st_mtime_ns, head_sha256(path, whole=label)


def head_sha256(path: Path, *, whole: bool) -> str:
    """sha256 of the beginning of a file or, if it is no larger than that, of all of it.

    Size and time alone do not tell an edit whose time was kept, as ``rsync -t`` and ``tar`` do.
    Empty for a folder or what cannot be read: reading the case says so.
    """
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(MAX_WHOLE_BYTES if whole else HEAD_BYTES)).hexdigest()
    except OSError:
        return ""


def code_sha256(start: Path, package: Path = PACKAGE) -> str:
    """sha256 of the meaning of ``start`` and of all modules of ``package`` that it leads to.

    Args:
        start: a Python file, inside the package or outside.
        package: folder of the package whose modules are followed; other packages are not.
    """
    meanings: dict[str, str] = {}
    package = package.resolve()
    waiting = [start.resolve()]
    while waiting:
        file = waiting.pop()
        name = _module_name(file, package)
        if name in meanings:
            continue
        state = file.stat()
        meanings[name], imported = _module(file, name, package, (state.st_mtime_ns, state.st_size))
        waiting += imported
    pairs = [f"[{json.dumps(name)}, {text}]" for name, text in sorted(meanings.items())]
    return hashlib.sha256(f"[{', '.join(pairs)}]".encode()).hexdigest()


@functools.cache
def _module(
    file: Path, name: str, package: Path, state: tuple[int, int]
) -> tuple[str, tuple[Path, ...]]:
    """What a module does, as JSON, and the files that it imports.

    Kept for each ``state`` of the file, as a process asks for them again with every data set.
    """
    tree = ast.parse(file.read_text("utf-8"))
    return json.dumps(_meaning(tree)), tuple(_imported(tree, name, package))


def _module_name(file: Path, package: Path) -> str:
    """Dotted name of a file of the package, with ``__init__``; of another file its bare name."""
    inside = file.is_relative_to(package)
    return ".".join(file.relative_to(package.parent).with_suffix("").parts) if inside else file.stem


def _imported(tree: ast.Module, name: str, package: Path) -> Iterator[Path]:
    """Files of the package that a module imports, also inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = (node.module or "").split(".") if node.module else []
            if node.level:
                origin = [*name.split(".")[: -node.level], *origin]
            targets = [".".join([*origin, alias.name]) for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] != package.name:
                continue
            for length in range(1, len(parts) + 1):  # a package runs before its modules
                path = package.parent.joinpath(*parts[:length])
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.is_file():
                        yield file


def _meaning(node: object) -> object:
    """A syntax tree as JSON, without docstrings and what differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = {
            field: _meaning(value)
            for field, value in ast.iter_fields(node)
            if value is not None and value != []
        }
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            fields["body"] = [_meaning(part) for part in node.body if not _is_text(part)]
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_meaning(part) for part in node]
    return repr(node)


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a bare string, as docstrings of functions and of fields are."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
