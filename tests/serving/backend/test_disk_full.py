"""Uploads to a full disk: what the client is answered, and which files remain."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reir.errors import StoreFull
from reir_serving.http.problems import problem_of_reir_error

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refusing(*_: Any, **__: Any) -> Any:
    raise FULL


def add(client: TestClient, photo: bytes) -> Any:
    return client.post("/v1/galleries/photos/images", files={"image": ("new.png", photo)})


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def fail_the_file(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr("reir_serving.backend.photos.os.replace", refusing)


def fail_the_folder(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(Path, "mkdir", refusing)


def fail_the_store(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    def full(*_: Any) -> None:
        raise StoreFull("journal cannot be written")

    monkeypatch.setattr(backend.store, "upsert_images", full)


@pytest.mark.parametrize("fail", [fail_the_file, fail_the_folder, fail_the_store])
def test_an_upload_to_a_full_disk_fails_and_leaves_no_files(
    fail: Callable[[pytest.MonkeyPatch, Any], None],
    monkeypatch: pytest.MonkeyPatch,
    client: TestClient,
    backend: Any,
    magenta_box: bytes,
    tmp_path: Path,
) -> None:
    before = files_below(tmp_path)
    with monkeypatch.context() as failing:
        fail(failing, backend)
        refused = add(client, magenta_box)
    assert (refused.status_code, refused.json()["type"]) == (507, "/problems/storage-full")
    assert refused.headers["content-type"] == "application/problem+json"
    assert files_below(tmp_path) == before
    assert add(client, magenta_box).status_code == 201


def test_a_failed_second_upload_keeps_the_stored_photo(
    monkeypatch: pytest.MonkeyPatch, client: TestClient, backend: Any, magenta_box: bytes
) -> None:
    added = add(client, magenta_box).json()
    with monkeypatch.context() as failing:
        fail_the_store(failing, backend)
        assert add(client, magenta_box).status_code == 507
    shown = client.get(f"/v1/images/{added['image_id']}", params={"gallery": "photos"})
    assert shown.content == magenta_box


def test_a_request_body_that_fills_the_disk_gets_507(
    monkeypatch: pytest.MonkeyPatch, client: TestClient, magenta_box: bytes
) -> None:
    monkeypatch.setattr("starlette.datastructures.UploadFile.write", refusing)
    assert add(client, magenta_box).status_code == 507
    parts = {"image": ("new.png", magenta_box)}
    similar = client.post(
        "/v1/search/similar", files=parts, data={"request": '{"gallery": "photos"}'}
    )
    assert similar.status_code == 507


def test_another_os_error_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, client: TestClient, magenta_box: bytes
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("reir_serving.backend.photos.os.replace", denied)
    assert add(client, magenta_box).status_code == 500


def test_the_error_about_a_full_store_hides_its_path() -> None:
    refused = problem_of_reir_error(StoreFull("journal /home/x cannot be written"))
    assert refused.status_code == 507
    assert "/home" not in refused.detail
