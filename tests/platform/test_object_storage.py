"""Errors of object storage do not reveal credentials."""

from __future__ import annotations

import traceback

import pytest

from reir.errors import ImageError
from reir.images.photo_files import read_photo
from reir.object_storage import STORAGE_ERRORS, open_filesystem, without_secrets

URIS = (
    "s3://KEY:SECRET@bucket/a b",
    "s3://KEY:SECRET@buck et/a",
    "s3://KEY:SEC/RET@bucket/a",
    "gs://KEY:SECRET@bucket/a?b= SECRET",
    "ftp://KEY:SECRET@host/a",
)


@pytest.mark.parametrize("uri", URIS)
def test_the_error_about_a_wrong_uri_has_no_credentials(uri: str) -> None:
    with pytest.raises(STORAGE_ERRORS) as caught:
        open_filesystem(uri)
    assert without_secrets(uri) in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    for secret in ("KEY", "SEC/RET", "SECRET"):
        assert secret not in shown


@pytest.mark.parametrize("uri", URIS[:4])
def test_the_error_about_a_photo_has_no_credentials(uri: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read: Cannot parse URI") as caught:
        read_photo(uri)
    assert "KEY" not in str(caught.value)
