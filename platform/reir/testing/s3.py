"""An S3 server on this machine, from the package moto of the extra `dev`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def local_s3(bucket: str) -> Iterator[tuple[str, str]]:
    """Run a server that has one bucket, with credentials in the environment.

    Yields:
        What follows the path in the URI of a bucket, and the address of the server.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        yield f"?endpoint_override={address}&scheme=http&region=us-east-1", address
        server.stop()
