"""What the store keeps about a gallery goes when the gallery does."""

from __future__ import annotations

import ast

import pytest

from reir.errors import GalleryNotFound
from reir.operations.documents import OF_GALLERY, delete_gallery
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing.repository import ROOT, SOURCE_ROOTS


def test_documents_of_other_galleries_stay() -> None:
    store = MemoryStore()
    for gallery in ("a", "a2"):
        store.create_version(gallery, "v", VersionSpec(dim=4, digest="x"))
        for kind in OF_GALLERY:
            store.put_document(kind, gallery, {})
            store.put_document(kind, f"{gallery}/1", {})
    store.put_document("receipt", "a/1", {})
    delete_gallery(store, "a")
    assert store.galleries() == ["a2"]
    for kind in OF_GALLERY:
        assert list(store.find_documents(kind)) == ["a2", "a2/1"]
    assert list(store.find_documents("receipt")) == ["a/1"]
    with pytest.raises(GalleryNotFound):
        delete_gallery(store, "a")


def kinds_in_the_code() -> set[str]:
    """Values of the constants KIND and ..._KIND of all modules that write documents."""
    found = set()
    for root in SOURCE_ROOTS:
        for path in (ROOT / root).rglob("*.py"):
            text = path.read_text()
            for node in ast.parse(text).body if "put_document(" in text else ():
                if isinstance(node, ast.Assign):
                    names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
                    if any(name == "KIND" or name.endswith("_KIND") for name in names):
                        found |= set(ast.literal_eval(ast.Tuple([node.value], ast.Load())))
    return {kind for each in found for kind in (each if isinstance(each, tuple) else (each,))}


def test_every_kind_of_document_is_either_deleted_or_kept_on_purpose() -> None:
    kept = {"lease", "receipt", "erased", "erasing"}
    assert {"canary", "source", "live-history"} <= kinds_in_the_code() <= {*OF_GALLERY, *kept}
