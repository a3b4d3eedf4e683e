"""Dashboards, and recording and alert rules, of the platform."""
