"""Sources of images: `open_source` opens one of any form, `Source` is the interface of all."""

from reir_ingestion.sources.contract import (
    IMAGE_SUFFIXES,
    OnError,
    Source,
    SourceFile,
    ignore_error,
)
from reir_ingestion.sources.opening import SourceOptions, open_source

__all__ = [
    "IMAGE_SUFFIXES",
    "OnError",
    "Source",
    "SourceFile",
    "SourceOptions",
    "ignore_error",
    "open_source",
]
