"""The state of the source tree: folder sizes, import cycles, long files, warnings, lines of code.

    python benchmarks/house.py                          runs the tests first, to count warnings
    python benchmarks/house.py --pytest-log test.log    reads the closing line of an earlier run

    house.max_folder_modules    Python files directly in the largest folder of sources or tests
    house.import_cycles         groups of modules that import one another; imports within functions
                                and under TYPE_CHECKING included
    house.files_over_500        Python files of more than 500 lines
    house.functions_over_70     functions of more than 70 lines
    house.warnings              warnings in pytest's closing line
    house.source_lines          lines of all Python files of the five source roots
    house.source_lines_before   the same at commit 1f9db54, when `platform` held the test helpers

`tests/test_repository.py` fails when a folder, a file, a function or the imports break the limits.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from _report import ROOT, write_report

from reir_testing.repository import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    SOURCE_ROOTS,
    import_cycles,
    long_functions,
    modules_per_folder,
    python_files,
    source_import_graph,
    source_lines,
)

BEFORE = "1f9db54"
"""The last commit before modules were grouped into folders by their job."""

TESTS = (sys.executable, "-m", "pytest", "-q", "-m", "not slow and not milvus")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--pytest-log", type=Path, help="Output of a pytest run. Without it, the tests are run."
    )
    arguments = parser.parse_args()
    log = arguments.pytest_log.read_text("utf-8") if arguments.pytest_log else run_tests()

    everything = python_files()
    cycles = import_cycles(source_import_graph())
    for cycle in cycles:
        print("import cycle:", " <-> ".join(cycle))
    figures = {
        "house.max_folder_modules": max(
            modules_per_folder(python_files(*SOURCE_ROOTS, "tests")).values()
        ),
        "house.import_cycles": len(cycles),
        "house.files_over_500": sum(source_lines(path) > MAX_FILE_LINES for path in everything),
        "house.functions_over_70": sum(
            len(long_functions(path.read_text("utf-8"), MAX_FUNCTION_LINES)) for path in everything
        ),
        "house.warnings": warnings_in(log),
        "house.source_lines": sum(map(source_lines, python_files(*SOURCE_ROOTS))),
        # Measured now, so that both figures count lines in the same way.
        "house.source_lines_before": source_lines_at(BEFORE),
    }
    for name, value in figures.items():
        print(f"{name:<28} {value:>7,}")
    print(f"written to {write_report('house', figures).relative_to(ROOT)}")


def run_tests() -> str:
    """Run the tests as `make test` does, and return what pytest printed."""
    done = subprocess.run(TESTS, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout


def warnings_in(log: str) -> int:
    """Return the number of warnings in pytest's closing line, e.g. "9 passed, 2 warnings in 3s".

    Raises:
        SystemExit: no line of the log looks like pytest's closing line.
    """
    closing = re.findall(
        r"^.*\b(?:passed|failed|errors?)\b.* in \d+[\d.:]*s\b.*$", log, re.MULTILINE
    )
    if not closing:
        raise SystemExit("the pytest log has no closing line such as '9 passed in 3.21s'")
    found = re.search(r"(\d+) warnings?\b", closing[-1])
    return int(found.group(1)) if found else 0


def source_lines_at(commit: str) -> int:
    """Count the lines of the Python files of all source roots at a commit.

    Raises:
        SystemExit: the commit is not in this clone.
    """
    patterns = [f"{top}/*.py" for top in SOURCE_ROOTS]
    counted = subprocess.run(
        ["git", "grep", "--count", "", commit, "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if counted.returncode:
        raise SystemExit(
            f"cannot read commit {commit}; run this in a clone with its full history: "
            f"{counted.stderr.strip()}"
        )
    return sum(int(line.rpartition(":")[2]) for line in counted.stdout.splitlines())


if __name__ == "__main__":
    main()
