"""`local_s3`: an S3 server on this machine, provided by the package moto (extra `dev`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


@dataclass(frozen=True)
class Bucket:
    """The objects of a bucket whose keys start with a prefix.

    Attributes:
        client: boto3 client of the server.
        name: name of the bucket.
        prefix: prefix of the keys, without slashes at its ends.
        options: query part of a URI, which contains the address of the server.
    """

    client: Any
    name: str
    prefix: str
    options: str

    def put(self, key: str, content: bytes = b"x") -> str:
        """Write an object; return its canonical URI (`key` must not need percent-encoding)."""
        self.client.put_object(Bucket=self.name, Key=f"{self.prefix}/{key}", Body=content)
        return f"s3://{self.name}/{self.prefix}/{key}"

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.client.delete_object(Bucket=self.name, Key=f"{self.prefix}/{key}")

    def source(self, key: str = "") -> str:
        """Return a URI for `open_source`."""
        return f"s3://{self.name}/{self.prefix}/{key}{self.options}"


@contextmanager
def local_s3(bucket: str) -> Iterator[Bucket]:
    """Run a server with one bucket, and set its credentials in the environment."""
    # The server accepts any credentials, but clients refuse to send requests without some.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket=bucket)
        options = f"?endpoint_override={address}&scheme=http&region=us-east-1"
        yield Bucket(client, bucket, "all", options)
        server.stop()
