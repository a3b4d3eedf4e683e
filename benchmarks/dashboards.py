"""Do all panels of the dashboards have data on a running system?

    python benchmarks/dashboards.py

Runs the whole platform on this machine (`reir_testing/monitoring/live_system.py`), scraped by a
real Prometheus: indexing, a server with searches, feedback and rejected requests, the monitor, a
schedule with backups, a re-indexing job, indexing on Ray Data, and training on Ray Train. Then
every query of every panel of k8s/monitoring/dashboards/ is evaluated through Prometheus's API, and
the panels are drawn into docs/dashboards/.

    dashboards.live_share      panels whose queries all have data / panels
    dashboards.panels          panels
    dashboards.without_data    names of the panels without data
    dashboards.targets_down    scrape jobs that could not be scraped at the end
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from _indexing import parser_of
from _report import ROOT, write_report

from reir_testing.monitoring.live_panels import LivePanel, evaluate_dashboard
from reir_testing.monitoring.live_system import RATE_INTERVAL_S, live_system
from reir_testing.monitoring.panel_pictures import draw_dashboard

DASHBOARDS = ROOT / "k8s" / "monitoring" / "dashboards"
PICTURES = ROOT / "docs" / "dashboards"


def main() -> None:
    """Measure, draw, print the figures, and write them to a report."""
    parser = parser_of(__doc__)
    parser.add_argument("--photos", type=int, default=300, help="Photos of the gallery.")
    parser.add_argument("--no-ray", action="store_true", help="Leave out Ray Data and Ray Train.")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="Folder for the pictures.")
    arguments = parser.parse_args()
    # If the benchmark is terminated, the system must not stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="d-") as name:
        panels, down = measure(Path(name), arguments.photos, with_ray=not arguments.no_ray)
    without = [f"{each.dashboard}: {each.title}" for each in panels if not each.has_data]
    figures = {
        "dashboards.live_share": round(1 - len(without) / len(panels), 4),
        "dashboards.panels": len(panels),
        "dashboards.without_data": without,
        "dashboards.targets_down": down,
    }
    for key, value in figures.items():
        print(f"{key:28} {value}")
    print(f"figures in {write_report('dashboards', figures).name}")
    # After the report: new pictures in docs/ would make the tree dirty.
    for dashboard in dict.fromkeys(panel.dashboard for panel in panels):
        of_dashboard = [panel for panel in panels if panel.dashboard == dashboard]
        draw_dashboard(of_dashboard, arguments.pictures / f"{dashboard}.png")


def measure(folder: Path, num_photos: int, *, with_ray: bool) -> tuple[list[LivePanel], list[str]]:
    """Return all panels, and the scrape jobs that are down at the end."""
    with live_system(folder, num_photos=num_photos, with_ray=with_ray) as system:
        now_s = time.time()
        panels = [
            panel
            for file in sorted(DASHBOARDS.glob("*.json"))
            for panel in evaluate_dashboard(
                file, system.prometheus, system.started_s, now_s, RATE_INTERVAL_S
            )
        ]
        targets = system.prometheus.targets()
    return panels, sorted(each["labels"]["job"] for each in targets if each["health"] != "up")


if __name__ == "__main__":
    main()
