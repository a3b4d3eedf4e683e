"""The store and the buckets of a rehearsal."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from reir_testing.milvus_server import milvus_server

PHOTOS = "reir-photos"
_BUCKET = re.compile(r"s3://([^/]+)")
_REGION = "us-east-1"


@contextmanager
def local_store(folder: Path, *, embedded: bool) -> Iterator[str]:
    """Provide a store: a Milvus server if the package `milvus` is installed.

    Args:
        folder: for its data.
        embedded: whether to use an embedded store in any case.

    Yields:
        Its location.
    """
    folder.mkdir()
    if embedded or importlib.util.find_spec("milvus") is None:
        yield str(folder)
        return
    with milvus_server(folder) as server:
        yield server.uri


@contextmanager
def local_buckets(uris: Sequence[str], photos: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Run an S3 server with the buckets of `uris`, and photos in the bucket `PHOTOS`.

    Yields:
        The variables by which programs find it.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_REGION": _REGION,
        }
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name=_REGION,
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        )
        for name in {found[1] for uri in uris if (found := _BUCKET.match(uri))}:
            client.create_bucket(Bucket=name)
        for photo in photos:
            client.upload_file(str(photo), PHOTOS, photo.name)
        yield variables
    finally:
        server.stop()
