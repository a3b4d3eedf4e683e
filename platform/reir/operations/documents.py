"""The documents that belong to a gallery, and go with it."""

from __future__ import annotations

from reir.store.contract import InstanceStore

OF_GALLERY = ("backup", "canary", "live-history", "reindex", "reindex-report", "restore", "source")
"""Kinds of documents whose name is the name of a gallery, or begins with it and a slash.

Receipts of erasures, and the list of what was erased, are kept when a gallery is deleted: otherwise
erased photos would come back if it is indexed again.
"""

OF_BACKUP = ("canary", "erased", "source")
"""Kinds of documents of a gallery that its backup contains."""


def delete_gallery(store: InstanceStore, gallery: str) -> None:
    """Delete a gallery with all its versions, and what the store keeps about it.

    Raises:
        GalleryNotFound: there is no such gallery.
    """
    store.drop_gallery(gallery)
    for kind in OF_GALLERY:
        names = store.find_documents(kind, gallery)
        ours = [each for each in names if each == gallery or each.startswith(f"{gallery}/")]
        store.delete_documents(kind, ours)
