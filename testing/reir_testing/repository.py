"""Measures the source tree itself: its folders, files, functions and imports.

The guards in `tests/test_repository.py` and the figures of `benchmarks/house.py` share it, so that
both mean the same by a module or a cycle. Knows no model, no store and no Ray.
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
}
"""Top-level folder -> the one package that it holds."""

MAX_FOLDER_MODULES = 20
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70


def tracked_files() -> list[Path]:
    """Files under version control; without git (an unpacked archive), all but build leftovers."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        leftovers = {".venv", ".git", "__pycache__", "dist", "build", "out", "runs"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [str(path) for path in found if not leftovers & set(path.parts)]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def relative_name(path: Path) -> str:
    """Return the path relative to the repository root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def python_files(*top_folders: str) -> list[Path]:
    """Tracked Python files below these top-level folders, or all of them if none is named."""
    return [
        path
        for path in tracked_files()
        if path.suffix == ".py"
        and (not top_folders or path.relative_to(ROOT).parts[0] in top_folders)
    ]


def source_lines(path: Path) -> int:
    """Count the lines of a file, blank lines and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def modules_per_folder(paths: Iterable[Path]) -> dict[str, int]:
    """Folder -> number of Python files directly in it, `__init__.py` included."""
    return dict(Counter(relative_name(path.parent) for path in paths))


def long_functions(source: str, limit: int) -> list[str]:
    """Functions of more than `limit` lines, docstring included and decorators left out."""
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > limit
    ]


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module) of every import, also of those within functions."""
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
    """Module -> the modules among `sources` that it imports.

    Imports in functions and under `TYPE_CHECKING` count: they hide a cycle, they do not remove it.
    `from package import name` leads to the module `package.name` where there is one, otherwise to
    the package itself. That Python also runs the `__init__.py` of every parent is not an edge;
    with it, each package that exports one of its own modules would be a cycle.

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
    """Groups of modules that import one another: strongly connected components of two or more."""
    reachable = {module: _reachable(graph, module) for module in graph}
    groups = {
        frozenset(other for other in reachable[module] if module in reachable[other])
        for module in graph
        if module in reachable[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Modules that `start` imports, directly or through others; itself if it is in a cycle."""
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
