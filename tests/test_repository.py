"""Guards of the repository's shape: layout, one-way imports, sizes, and what must not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {
    "platform": "reir",
    "training": "reir_training",
    "ingestion": "reir_ingestion",
    "serving": "reir_serving",
}
MAY_IMPORT = {
    "reir": {"reir"},
    "reir_training": {"reir", "reir_training"},
    "reir_ingestion": {"reir", "reir_ingestion"},
    "reir_serving": {"reir", "reir_serving"},
}
RAY_FILES = {"jobs.py", "actors.py", "deployments.py"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

# A folder of one machine; `/home/ray` is the home within Ray's own container images.
MACHINE_PATH = re.compile(r"(?<![\w.~}$-])/(?:root|work|home/(?!ray\b)\w+|Users/\w+)/")
# A private host; the excepted names are known to every cloud or container user.
PRIVATE_HOST = re.compile(
    r"(?<![\w.-])(?!metadata\.google\.|host\.docker\.)[\w-]+(?:\.[\w-]+)*\.(?:internal|corp|intranet|lan)\b"
    r"|\b(?:artifactory|devpi|jfrog)\b",
    re.IGNORECASE,
)


def tracked_files() -> list[Path]:
    """Files under version control; without git (an unpacked archive), all that are no leftovers."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        leftovers = {".venv", ".git", "__pycache__", "dist", "build", "out", "runs"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [str(path) for path in found if not leftovers & set(path.parts)]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


TRACKED = tracked_files()
PYTHON = [path for path in TRACKED if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in SOURCE_ROOTS]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module) of every import, also of those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def layer_violations(package: str, source: str) -> list[str]:
    """Imports in `source`, a file of `package`, that point the wrong way."""
    return [
        f"line {line} imports {module}"
        for line, module in imports_of(ast.parse(source))
        if module.split(".")[0] in MAY_IMPORT and module.split(".")[0] not in MAY_IMPORT[package]
    ]


def ray_imports(source: str) -> list[int]:
    return [line for line, name in imports_of(ast.parse(source)) if name.split(".")[0] == "ray"]


def long_functions(source: str, limit: int) -> list[str]:
    """Functions of more than `limit` lines, decorators and docstring included."""
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > limit
    ]


def test_the_guards_see_the_repository() -> None:
    names = {shown(path) for path in TRACKED}
    assert {"pyproject.toml", "platform/reir/errors.py", "tests/test_repository.py"} <= names


def test_source_roots_and_tests_are_no_packages() -> None:
    wrong = [shown(ROOT / top / "__init__.py") for top in SOURCE_ROOTS]
    wrong = [name for name in wrong if (ROOT / name).exists()]
    wrong += [shown(path) for path in (ROOT / "tests").rglob("__init__.py")]
    assert wrong == [], "these would shadow the standard library or one another; delete them"


def test_each_source_root_holds_exactly_its_package() -> None:
    for top, package in SOURCE_ROOTS.items():
        held = {
            path.relative_to(ROOT / top).parts[0]
            for path in SOURCES
            if path.is_relative_to(ROOT / top)
        }
        assert held == {package}, f"{top}/ must hold the package {package} and nothing else"
        assert (ROOT / top / package / "py.typed").exists(), f"{package} lacks py.typed"


def test_the_standard_platform_module_still_imports_from_the_root() -> None:
    code = "import platform; assert platform.system(); import uuid; assert uuid.uuid4()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("top", "package"), SOURCE_ROOTS.items(), ids=SOURCE_ROOTS.values())
def test_imports_point_one_way(top: str, package: str) -> None:
    wrong = [
        f"{shown(path)}: {violation}"
        for path in SOURCES
        if path.is_relative_to(ROOT / top)
        for violation in layer_violations(package, path.read_text(encoding="utf-8"))
    ]
    assert wrong == [], f"{package} may import only {sorted(MAY_IMPORT[package])} of ours"


def test_the_layer_guard_finds_what_it_must() -> None:
    source = "def f():\n    from reir_serving.app import x\nimport reir_training\nimport reirx"
    assert layer_violations("reir", source) == [
        "line 3 imports reir_training",
        "line 2 imports reir_serving.app",
    ]
    assert layer_violations("reir_serving", "import reir.text\nfrom . import app") == []


def test_ray_is_imported_only_where_it_may_be() -> None:
    wrong = [
        f"{shown(path)}:{line}"
        for path in SOURCES
        if path.name not in RAY_FILES or path.is_relative_to(ROOT / "platform")
        for line in ray_imports(path.read_text(encoding="utf-8"))
    ]
    assert wrong == [], f"import ray only in {sorted(RAY_FILES)} of the three apps"
    assert ray_imports("from ray import serve\nimport ray.data as r\nimport rayon") == [1, 2]


def test_files_are_short() -> None:
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    wrong = [
        f"{shown(path)}: {found}"
        for path in PYTHON
        for found in long_functions(path.read_text(encoding="utf-8"), MAX_FUNCTION_LINES)
    ]
    assert wrong == [], f"functions have at most {MAX_FUNCTION_LINES} lines; split these"
    assert long_functions("def f():\n    a\n    b", 2) == ["f (3 lines)"]
    assert long_functions("def f():\n    a\n    b", 3) == []


def test_every_module_says_what_it_does() -> None:
    wrong = [
        shown(path)
        for path in PYTHON
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == [], "these need a docstring: what the module does and does not know"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [(MACHINE_PATH, "a path of one machine"), (PRIVATE_HOST, "a private host")],
    ids=["paths", "hosts"],
)
def test_nothing_of_one_machine_is_kept(pattern: re.Pattern[str], what: str) -> None:
    wrong = []
    for path in TRACKED:
        content = path.read_bytes()
        if b"\0" in content or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if found := pattern.search(line):
                wrong.append(f"{shown(path)}:{number}: {found.group()}")
    assert wrong == [], f"{what} must not be in the repository"


TOP = "/".join(("", "work", ""))  # in parts, so that a plain search of the tree finds no such path


@pytest.mark.parametrize(
    "line", ["cd /root/x", "'/home/ann/data'", f"open({TOP}a)", "path=/Users/ann/b"]
)
def test_machine_paths_are_recognised(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line", ["/home/ray/app", f"~{TOP}x", f"a{TOP}b", f"${{X}}{TOP}b", "/workspace/", "../root/x"]
)
def test_other_paths_are_left_alone(line: str) -> None:
    assert not MACHINE_PATH.search(line)


def test_private_hosts_are_recognised() -> None:
    assert PRIVATE_HOST.search("https://git.example.corp/x")
    assert PRIVATE_HOST.search("--index-url https://Artifactory/x")
    for known in ("http://metadata.google.internal/", "host.docker.internal", "milvus.svc:19530"):
        assert not PRIVATE_HOST.search(known)
