"""All dashboards."""

from __future__ import annotations

from reir_k8s.monitoring.dashboards.ingestion import INGESTION
from reir_k8s.monitoring.dashboards.overview import OVERVIEW
from reir_k8s.monitoring.dashboards.quality import QUALITY
from reir_k8s.monitoring.dashboards.serving import SERVING
from reir_k8s.monitoring.dashboards.training import TRAINING

PAGES = (OVERVIEW, SERVING, INGESTION, QUALITY, TRAINING)


def dashboard_files() -> dict[str, str]:
    """Return the name and the text of each dashboard."""
    return {f"{page.name}.json": page.to_json() for page in PAGES}
