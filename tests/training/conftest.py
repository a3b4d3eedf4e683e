"""Fixtures: a local S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reir_testing.s3 import local_s3

BUCKET = "runs-of-reir"


@pytest.fixture(scope="session")
def s3_options() -> Iterator[str]:
    """Yield the query string for the URI of a bucket; the bucket "runs-of-reir" exists."""
    with local_s3(BUCKET) as bucket:
        yield bucket.options
