"""Where images come from; `open_source` knows every form, `Source` is what they have in common."""

from reir_ingestion.sources.contract import (
    IMAGE_ENDINGS,
    OnError,
    Source,
    SourceFile,
    ignore_error,
)
from reir_ingestion.sources.opening import SourceOptions, open_source

__all__ = [
    "IMAGE_ENDINGS",
    "OnError",
    "Source",
    "SourceFile",
    "SourceOptions",
    "ignore_error",
    "open_source",
]
