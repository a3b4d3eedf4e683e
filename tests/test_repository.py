"""Guards of the repository's shape: layout, one-way imports, sizes, and what must not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reir_testing.repository import (
    MAX_FILE_LINES,
    MAX_FOLDER_MODULES,
    MAX_FUNCTION_LINES,
    ROOT,
    SOURCE_ROOTS,
    import_cycles,
    import_graph,
    imports_of,
    long_functions,
    modules_per_folder,
    relative_name,
    source_import_graph,
    source_lines,
    tracked_files,
)

MAY_IMPORT = {
    "reir": {"reir"},
    "reir_training": {"reir", "reir_training"},
    "reir_ingestion": {"reir", "reir_ingestion"},
    "reir_serving": {"reir", "reir_serving"},
    # Helpers of tests and benchmarks; not in the wheel, so no package of the wheel may import them.
    "reir_testing": {"reir", "reir_training", "reir_ingestion", "reir_serving", "reir_testing"},
}
# Generates files of k8s/ and rehearses the manifests; not in the wheel either.
MAY_IMPORT["reir_k8s"] = {*MAY_IMPORT, "reir_k8s"}
RAY_FOLDERS = (
    "ingestion/reir_ingestion/ray",
    "serving/reir_serving/ray",
    "training/reir_training/run",
)

# A folder of one machine; `/home/ray` is the home within Ray's own container images.
MACHINE_PATH = re.compile(r"(?<![\w.~}$-])/(?:root|work|home/(?!ray\b)\w+|Users/\w+)/")
# A private host; the excepted names are known to every cloud or container user.
PRIVATE_HOST = re.compile(
    r"(?<![\w.-])(?!metadata\.google\.|host\.docker\.)[\w-]+(?:\.[\w-]+)*\.(?:internal|corp|intranet|lan)\b"
    r"|\b(?:artifactory|devpi|jfrog)\b",
    re.IGNORECASE,
)


TRACKED = tracked_files()
PYTHON = [path for path in TRACKED if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in SOURCE_ROOTS]


def layer_violations(package: str, source: str) -> list[str]:
    """Imports in `source`, a file of `package`, that point the wrong way."""
    return [
        f"line {line} imports {module}"
        for line, module in imports_of(ast.parse(source))
        if module.split(".")[0] in MAY_IMPORT and module.split(".")[0] not in MAY_IMPORT[package]
    ]


def ray_imports(source: str) -> list[int]:
    return [line for line, name in imports_of(ast.parse(source)) if name.split(".")[0] == "ray"]


def test_the_guards_see_the_repository() -> None:
    names = {relative_name(path) for path in TRACKED}
    assert {"pyproject.toml", "platform/reir/errors.py", "tests/test_repository.py"} <= names


def test_source_roots_and_tests_are_no_packages() -> None:
    wrong = [relative_name(ROOT / top / "__init__.py") for top in SOURCE_ROOTS]
    wrong = [name for name in wrong if (ROOT / name).exists()]
    wrong += [relative_name(path) for path in (ROOT / "tests").rglob("__init__.py")]
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
        f"{relative_name(path)}: {violation}"
        for path in SOURCES
        if path.is_relative_to(ROOT / top)
        for violation in layer_violations(package, path.read_text(encoding="utf-8"))
    ]
    assert wrong == [], f"{package} may import only {sorted(MAY_IMPORT[package])} of ours"


def test_the_layer_guard_finds_what_it_must() -> None:
    source = "def f():\n    from reir_serving.http.app import x\nimport reir_training\nimport reirx"
    assert layer_violations("reir", source) == [
        "line 3 imports reir_training",
        "line 2 imports reir_serving.http.app",
    ]
    assert layer_violations("reir_serving", "import reir.text\nfrom . import app") == []


def test_ray_is_imported_only_where_it_may_be() -> None:
    wrong = [
        f"{relative_name(path)}:{line}"
        for path in SOURCES
        if relative_name(path.parent) not in RAY_FOLDERS
        for line in ray_imports(path.read_text(encoding="utf-8"))
    ]
    assert wrong == [], f"import ray only in {', '.join(RAY_FOLDERS)}"
    assert ray_imports("from ray import serve\nimport ray.data as r\nimport rayon") == [1, 2]


def test_folders_are_small() -> None:
    # `benchmarks/` is exempt: each script there is a command of its own that is found by its name.
    folders = modules_per_folder(
        path for path in PYTHON if path.relative_to(ROOT).parts[0] != "benchmarks"
    )
    wrong = {name: n for name, n in folders.items() if n > MAX_FOLDER_MODULES}
    assert wrong == {}, f"folders hold at most {MAX_FOLDER_MODULES} modules; group these by subject"


def test_no_modules_import_one_another() -> None:
    assert import_cycles(source_import_graph()) == [], "move what both need into a third module"


def test_the_cycle_guard_sees_imports_in_functions_and_for_types() -> None:
    sources = {
        "p": "from p.a import f",
        "p.a": "def f():\n    from p import b",
        "p.b": "if TYPE_CHECKING:\n    from p.c import x",
        "p.c": "import p.a",
        "p.d": "import os\nfrom p import f, a",
    }
    graph = import_graph(sources)
    assert graph["p.d"] == {"p", "p.a"}
    assert import_cycles(graph) == [["p.a", "p.b", "p.c"]]


def test_files_are_short() -> None:
    lengths = {relative_name(path): source_lines(path) for path in PYTHON}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    wrong = [
        f"{relative_name(path)}: {found}"
        for path in PYTHON
        for found in long_functions(path.read_text(encoding="utf-8"), MAX_FUNCTION_LINES)
    ]
    assert wrong == [], f"functions have at most {MAX_FUNCTION_LINES} lines; split these"
    assert long_functions("def f():\n    a\n    b", 2) == ["f (3 lines)"]
    assert long_functions("def f():\n    a\n    b", 3) == []


def test_every_module_says_what_it_does() -> None:
    wrong = [
        relative_name(path)
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
                wrong.append(f"{relative_name(path)}:{number}: {found.group()}")
    assert wrong == [], f"{what} must not be in the repository"


TOP = "/".join(("", "work", ""))  # in parts, so that a plain search of the tree finds no such path


@pytest.mark.parametrize(
    "line", ["cd /root/x", "'/home/ann/data'", f"open({TOP}a)", "path=/Users/ann/b"]
)
def test_machine_paths_are_recognized(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line", ["/home/ray/app", f"~{TOP}x", f"a{TOP}b", f"${{X}}{TOP}b", "/workspace/", "../root/x"]
)
def test_other_paths_are_left_alone(line: str) -> None:
    assert not MACHINE_PATH.search(line)


def test_private_hosts_are_recognized() -> None:
    assert PRIVATE_HOST.search("https://git.example.corp/x")
    assert PRIVATE_HOST.search("--index-url https://Artifactory/x")
    for known in ("http://metadata.google.internal/", "host.docker.internal", "milvus.svc:19530"):
        assert not PRIVATE_HOST.search(known)
