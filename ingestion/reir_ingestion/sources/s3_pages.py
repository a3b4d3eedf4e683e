"""Listing a folder of S3 a page at a time, so that it may hold any number of objects.

pyarrow, which reads the objects, hands a folder over as a whole. The connection is made from what
it knows of the bucket, so both ask the same server in the same name.
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

from reir_ingestion.sources.contract import Status
from reir_ingestion.sources.retrying import Unreachable

PAGE_OBJECTS = 1000
"""Most of one page; no server gives more."""

_MAY_PASS = (408, 429)
_GONE = 404


class Entry(NamedTuple):
    """What lies in a folder: a file with its status, or a folder, which has none."""

    name: str
    status: Status | None


class Page(NamedTuple):
    """A part of a folder, and the token to ask for the next one, if there is one."""

    entries: list[Entry]
    token: str | None


class S3Pages:
    """Lists the folders of S3 buckets."""

    def __init__(self, filesystem: S3FileSystem) -> None:
        """Connect to where `filesystem` does."""
        (known,) = filesystem.__reduce__()[1]
        session = botocore.session.get_session()
        self._client = session.create_client("s3", **_connection(known))

    def page(self, bucket: str, prefix: str, token: str | None) -> Page:
        """Return the part of the folder `prefix`, which ends with a slash, that `token` names.

        Raises:
            Unreachable: another attempt may succeed.
            OSError: refused.
        """
        more = {} if token is None else {"ContinuationToken": token}
        try:
            answer = self._client.list_objects_v2(
                Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=PAGE_OBJECTS, **more
            )
        except ClientError as error:
            return _refused(error)
        except NoCredentialsError as error:
            raise OSError(f"{error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except BotoCoreError as error:
            raise Unreachable(str(error)) from error
        return Page(list(_entries(answer, prefix)), answer.get("NextContinuationToken"))


def _connection(known: dict[str, Any]) -> dict[str, Any]:
    """Arguments for botocore from the options of a pyarrow file system."""
    endpoint = known["endpoint_override"]
    if endpoint and "://" not in endpoint:
        endpoint = f"{known['scheme']}://{endpoint}"
    virtual = not endpoint or known["force_virtual_addressing"]
    config = Config(
        s3={"addressing_style": "auto" if virtual else "path"},
        signature_version=UNSIGNED if known["anonymous"] else None,
        retries={"mode": "standard", "total_max_attempts": 2},
    )
    return {
        "region_name": known["region"] or None,
        "endpoint_url": endpoint or None,
        "aws_access_key_id": known["access_key"] or None,
        "aws_secret_access_key": known["secret_key"] or None,
        "aws_session_token": known["session_token"] or None,
        "verify": known["tls_ca_file_path"] or None,
        "config": config,
    }


def _entries(answer: dict[str, Any], prefix: str) -> Iterator[Entry]:
    for each in answer.get("Contents", ()):
        if each["Key"] != prefix:  # what some tools leave to mark a folder
            status = Status(each["Size"], _nanoseconds(each["LastModified"]))
            yield Entry(each["Key"].removeprefix(prefix), status)
    for each in answer.get("CommonPrefixes", ()):
        yield Entry(each["Prefix"].removeprefix(prefix)[:-1], None)


def _nanoseconds(time: datetime) -> int:
    """To the millisecond, as S3 lists it; a float of seconds is not exact beyond."""
    return round(time.timestamp() * 1e3) * 1_000_000


def _refused(error: ClientError) -> Page:
    """An empty page where there is no such bucket; else raises."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == _GONE:
        return Page([], None)
    if status in _MAY_PASS or status >= 500:
        raise Unreachable(str(error)) from error
    raise OSError(str(error)) from error
