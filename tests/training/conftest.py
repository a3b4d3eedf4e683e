"""An S3 server on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reir.testing.s3 import local_s3

BUCKET = "runs-of-reir"


@pytest.fixture(scope="session")
def s3_options() -> Iterator[str]:
    """What follows the path in the URI of a bucket; the bucket "runs-of-reir" exists."""
    with local_s3(BUCKET) as bucket:
        yield bucket.options
