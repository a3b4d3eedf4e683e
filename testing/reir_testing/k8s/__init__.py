"""What tests of the manifests need: schemas, and which connections NetworkPolicies allow."""

from __future__ import annotations

import shutil

import pytest

NEEDS_KUBECTL = pytest.mark.skipif(
    shutil.which("kubectl") is None,
    reason="`kubectl kustomize` is needed; install kubectl (Debian: apt-get install kubectl)",
)
