"""An S3 server on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "runs-of-reir"


@pytest.fixture(scope="session")
def s3_options() -> Iterator[str]:
    """What follows the path in the URI of a bucket; the bucket "runs-of-reir" exists."""
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    yield f"?endpoint_override={address}&scheme=http&region=us-east-1"
    server.stop()
    patch.undo()
