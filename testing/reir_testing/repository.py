"""Measures the source tree itself: its folders, files, functions and imports.

The guards in `tests/test_repository.py` and the figures of `benchmarks/house.py` share this module,
so that both count modules and import cycles in the same way. It uses no model, store or Ray.
"""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = {
    "platform": "reir",
    "training": "reir_training",
    "ingestion": "reir_ingestion",
    "serving": "reir_serving",
    "testing": "reir_testing",
    "k8s": "reir_k8s",
}
"""Top-level folder -> the only package in it."""

# Limits that keep a folder, a file and a function small enough to read at once.
MAX_FOLDER_MODULES = 20
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70


def tracked_files() -> list[Path]:
    """Return the files under version control.

    In an unpacked archive, which has no git, these are all files except build leftovers.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        leftovers = {".venv", ".git", "__pycache__", "dist", "build", "out", "runs"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [str(path) for path in found if not leftovers & set(path.parts)]
    # Git also lists files that were deleted but whose deletion is not committed.
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def relative_name(path: Path) -> str:
    """Return the path relative to the repository root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def python_files(*top_folders: str) -> list[Path]:
    """Return the tracked Python files below these top-level folders, or all if none is named."""
    return [
        path
        for path in tracked_files()
        if path.suffix == ".py"
        and (not top_folders or path.relative_to(ROOT).parts[0] in top_folders)
    ]


def source_lines(path: Path) -> int:
    """Count the lines of a file, including blank lines and comments."""
    return len(path.read_text(encoding="utf-8").splitlines())


def modules_per_folder(paths: Iterable[Path]) -> dict[str, int]:
    """Map each folder to the number of Python files directly in it, including `__init__.py`."""
    return dict(Counter(relative_name(path.parent) for path in paths))


def long_functions(source: str, limit: int) -> list[str]:
    """Return the functions with more than `limit` lines.

    Docstrings and comments count, decorators do not.
    """
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > limit
    ]


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module) for every import, including those in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def module_name(path: Path) -> str:
    """Return the dotted name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each module to the modules among `sources` that it imports.

    Imports in functions and under `TYPE_CHECKING` count, because they hide a cycle but do not
    remove it. `from package import name` counts as an import of the module `package.name` if there
    is one, and otherwise of the package itself.

    Python also runs the `__init__.py` of every parent package. This does not count as an import;
    otherwise, each package that exports one of its own modules would be a cycle.

    Args:
        sources: dotted module name -> source code.
    """
    graph = {}
    for module, source in sources.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                names.update(members & sources.keys())
                if not members <= sources.keys():
                    names.add(node.module)
        graph[module] = names & sources.keys() - {module}
    return graph


def import_cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the groups of two or more modules that import one another.

    These are the strongly connected components of the graph.
    """
    reachable = {module: _reachable(graph, module) for module in graph}
    groups = {
        frozenset(other for other in reachable[module] if module in reachable[other])
        for module in graph
        if module in reachable[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Return the modules that `start` imports, directly or through others.

    `start` itself is among them only if it is in a cycle.
    """
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(graph[module])
    return found


def source_import_graph() -> dict[str, set[str]]:
    """Return the import graph of all packages of the repository."""
    return import_graph(
        {module_name(path): path.read_text("utf-8") for path in python_files(*SOURCE_ROOTS)}
    )
