"""The dashboards of Grafana, one module each; `pages.py` lists them."""
