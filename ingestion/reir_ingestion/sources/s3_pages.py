"""Lists a folder of S3 page by page, so that it may contain any number of objects.

pyarrow, which reads the objects, can only return a folder as a whole. The connection of this module
takes its options from the file system of pyarrow, so that both use the same server and account.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from pyarrow.fs import S3FileSystem

from reir_ingestion.sources.contract import FileStatus
from reir_ingestion.sources.network_retries import LocationUnreachable

PAGE_OBJECTS = 1000
"""Objects per page; servers return no more than that."""

_RETRYABLE = (408, 429)
_GONE = 404


class Entry(NamedTuple):
    """An entry of a folder: a file with its status, or a folder, which has none."""

    name: str
    status: FileStatus | None


class Page(NamedTuple):
    """A part of a folder, and the token of the next part, if there is one."""

    entries: list[Entry]
    token: str | None


class S3Pages:
    """Lists the folders of S3 buckets."""

    def __init__(self, filesystem: S3FileSystem) -> None:
        """Connect to the server of `filesystem`."""
        # pyarrow has no getters for the options; pickling is the only way to read them.
        (options,) = filesystem.__reduce__()[1]
        session = botocore.session.get_session()
        self._client = session.create_client("s3", **_connection(options))

    def page(self, bucket: str, prefix: str, token: str | None) -> Page:
        """Return the part of a folder that `token` names, or the first part.

        Raises:
            LocationUnreachable: another attempt may succeed.
            OSError: the server refused the request.
        """
        more = {} if token is None else {"ContinuationToken": token}
        try:
            answer = self._client.list_objects_v2(
                Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=PAGE_OBJECTS, **more
            )
        except ClientError as error:
            return _raise_or_empty(error)
        except NoCredentialsError as error:
            raise OSError(f"{error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except BotoCoreError as error:
            raise LocationUnreachable(str(error)) from error
        return Page(list(_entries(answer, prefix)), answer.get("NextContinuationToken"))


def _connection(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for botocore from the options of a pyarrow file system."""
    # pyarrow accepts an endpoint without a scheme; botocore needs a URL.
    endpoint = options["endpoint_override"]
    if endpoint and "://" not in endpoint:
        endpoint = f"{options['scheme']}://{endpoint}"
    # pyarrow's own rule: at an endpoint such as MinIO, the name of the bucket is in the path.
    virtual = not endpoint or options["force_virtual_addressing"]
    config = Config(
        s3={"addressing_style": "auto" if virtual else "path"},
        signature_version=UNSIGNED if options["anonymous"] else None,
        # Few attempts, because `list_with_retries` repeats the request as well.
        retries={"mode": "standard", "total_max_attempts": 2},
    )
    # pyarrow represents an option that is not set by an empty string. With None, botocore looks for
    # the value in the environment.
    return {
        "region_name": options["region"] or None,
        "endpoint_url": endpoint or None,
        "aws_access_key_id": options["access_key"] or None,
        "aws_secret_access_key": options["secret_key"] or None,
        "aws_session_token": options["session_token"] or None,
        "verify": options["tls_ca_file_path"] or None,
        "config": config,
    }


def _entries(answer: dict[str, Any], prefix: str) -> Iterator[Entry]:
    for each in answer.get("Contents", ()):
        if each["Key"] != prefix:  # some tools mark a folder by an empty object "folder/"
            status = FileStatus(each["Size"], _nanoseconds(each["LastModified"]))
            yield Entry(each["Key"].removeprefix(prefix), status)
    for each in answer.get("CommonPrefixes", ()):
        yield Entry(each["Prefix"].removeprefix(prefix)[:-1], None)


def _nanoseconds(time: datetime) -> int:
    """Return nanoseconds, exact to the millisecond, like the times that S3 lists.

    pyarrow must report the same time for the same object, or the object would count as changed.
    """
    # A float cannot hold the time in nanoseconds exactly, so the rounding has to come first.
    return round(time.timestamp() * 1e3) * 1_000_000


def _raise_or_empty(error: ClientError) -> Page:
    """Return an empty page if the bucket does not exist; otherwise raise an error.

    Raises:
        LocationUnreachable: another attempt may succeed.
        OSError: the server refused the request.
    """
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == _GONE:
        return Page([], None)
    if status in _RETRYABLE or status >= 500:
        raise LocationUnreachable(str(error)) from error
    raise OSError(str(error)) from error
