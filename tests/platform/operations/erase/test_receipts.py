"""Files of receipts: none is replaced, and none is left without its content."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reir.operations.erase.places import ErasePlaces
from reir.operations.erase.receipts import Receipt, read_receipt, write_receipt
from reir.store import open_store
from reir_testing.operations.erased_gallery import erase_now, fill, uri


@pytest.fixture
def receipt(places: ErasePlaces) -> Receipt:
    store = open_store("memory:")
    fill(store, "v1")
    return erase_now(store, places, photos=(uri("party.jpg"),))


def test_an_interruption_leaves_no_empty_file(
    receipt: Receipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "receipts" / "one.json"
    for name in ("os.link", "os.replace"):
        monkeypatch.setattr(name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_receipt(path, receipt)
    assert list(path.parent.iterdir()) == []


def test_a_disk_without_links(
    receipt: Receipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refused)
    found = [write_receipt(tmp_path / "new" / "one.json", receipt) for _ in range(2)]
    assert [path.name for path in found] == ["one.json", "one-2.json"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(found)
    assert all(read_receipt(path) == receipt for path in found)
