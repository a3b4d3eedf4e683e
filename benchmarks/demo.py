"""How many sentences of `reir demo` are answered right.

    python benchmarks/demo.py

    demo.top1           share of the sentences about something in the photos whose first hit is
                        right
    demo.top5           the same for the first five hits
    demo.absent         share of the sentences about something that no photo shows that are
                        recognized as such
    demo.false_absent   share of the sentences about something in the photos that are taken for
                        absent

The photos and sentences come with the package. They belong to `val`, on which the model was chosen,
so these figures show what a newcomer sees and not how well the model does on new photos.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _report import write_report

SCORES = ("top1", "top5", "absent", "false_absent")


def main() -> None:
    """Run the demo in an empty store, and write its scores."""
    with tempfile.TemporaryDirectory() as folder:
        reir = [sys.executable, "-c", "from reir.cli.main import main; main()"]
        sheet = Path(folder) / "sheet.png"
        options = ["--json", "--output", str(sheet), "--store", f"{folder}/store"]
        command = [*reir, "demo", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    figures: dict[str, float] = {
        "demo.sentences": len(found["answers"]),
        **{f"demo.{name}": round(found[name], 3) for name in SCORES},
    }
    print(json.dumps(figures, indent=2))
    write_report("demo", figures)


if __name__ == "__main__":
    main()
