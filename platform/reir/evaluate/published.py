"""Published results, which reports print next to ours if the split is the same.

A split is recognized by its numbers of photos and expressions, whatever its file is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# In the order of the published table, since its numbers are assigned to columns by position.
REIR_COLUMNS = tuple(f"br{k}_{iou}" for iou in (50, 70, 90) for k in (1, 5, 10))
REIRCOCO_VAL = (4994, 4994)
"""Number of photos and expressions in REIRCOCO's val split: one instance per photo."""

RESEDIS_PHOTOS = 7088
"""Number of photos of ReSeDis, whose expressions can be counted in several ways."""

# The order is that of the columns of the published table, see `_SOREC_COLUMNS`.
SOREC_SPLITS: Mapping[int, str] = {10712: "val", 10815: "testA", 17104: "testB"}
"""Number of expressions of a split of SOREC -> its name."""

_VAL_G, _REFERIT_TEST = "RefCOCOg val-g", "ReferIt test"
# No two of these splits have the same numbers.
REC_SPLITS: Mapping[tuple[int, int], str] = {
    (1500, 10834): "RefCOCO val",
    (750, 5657): "RefCOCO testA",
    (750, 5095): "RefCOCO testB",
    (1500, 10758): "RefCOCO+ val",
    (750, 5726): "RefCOCO+ testA",
    (750, 4889): "RefCOCO+ testB",
    (1300, 4896): "RefCOCOg val-u",
    (2600, 9602): "RefCOCOg test-u",
    (4650, 9536): _VAL_G,
}
"""Number of photos and expressions of a split -> its name in published tables."""

# 10,000 photos, a few of which are missing or damaged in each distribution of the data set. Papers
# state 60,103 expressions; the form of the `refer` API keeps some that they leave out.
_REFERIT_PHOTOS, _REFERIT_EXPRESSIONS = range(9_990, 10_001), range(58_000, 67_000)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        system: the system that was measured.
        figures: name -> percent; blank cells of the table are left out.
    """

    system: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class PublishedTable:
    """A published table, or a part of it.

    Attributes:
        source: where it was published.
        note: what a reader should know before comparing.
        columns: names of the figures, in order.
        rows: in the order of the source.
        title: what the table is called where it is printed.
    """

    source: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    title: str = "Comparison with published figures"

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "source": self.source,
            "note": self.note,
            "rows": {row.system: dict(row.figures) for row in self.rows},
        }


def reir_table(num_photos: int, num_expressions: int) -> PublishedTable | None:
    """Return the published BR@K of REIRCOCO val; None for any other split."""
    return REIR if (num_photos, num_expressions) == REIRCOCO_VAL else None


def tir_table(num_photos: int, num_texts: int) -> PublishedTable | None:
    """Return the published image recall on REIRCOCO val; None for any other split."""
    return TIR if (num_photos, num_texts) == REIRCOCO_VAL else None


def rec_table(splits: Sequence[str]) -> PublishedTable | None:
    """Return the columns of those splits that are published; None if none is."""
    return _with_columns(REC, splits)


def weak_rec_table(splits: Sequence[str]) -> PublishedTable | None:
    """Return the same of models that were trained without boxes."""
    return _with_columns(WEAK_REC, splits)


def _with_columns(table: PublishedTable, names: Sequence[str]) -> PublishedTable | None:
    """Return a table with some of its columns only; None if it has none of them."""
    columns = tuple(name for name in table.columns if name in names)
    return replace(table, columns=columns) if columns else None


def rec_split(num_photos: int, num_expressions: int) -> str:
    """Return the name of the published split of this size; empty if there is none."""
    if num_photos in _REFERIT_PHOTOS and num_expressions in _REFERIT_EXPRESSIONS:
        return _REFERIT_TEST
    return REC_SPLITS.get((num_photos, num_expressions), "")


def resedis_table(num_photos: int) -> PublishedTable | None:
    """Return the published image recall on ReSeDis; None for any other number of photos."""
    return RESEDIS if num_photos == RESEDIS_PHOTOS else None


def sorec_table(num_expressions: int) -> PublishedTable | None:
    """Return the published figures of the SOREC split of this size; None if there is none."""
    split = SOREC_SPLITS.get(num_expressions)
    if split is None:
        return None
    rows = []
    for row in SOREC.rows:
        own = {name: row.figures.get(f"{split}_{name}") for name in SOREC_FIGURES}
        present = {name: value for name, value in own.items() if value is not None}
        if present:
            rows.append(PublishedRow(row.system, present))
    return PublishedTable(SOREC.source, SOREC.note, SOREC_FIGURES, tuple(rows))


def _rows(columns: Sequence[str], text: str) -> tuple[PublishedRow, ...]:
    """Parse lines `system | figure figure ...`; "-" stands for a blank cell."""
    rows = []
    for line in text.strip().splitlines():
        system, _, numbers = line.partition("|")
        # Strict, since a number that was lost in copying would move all others to a wrong column.
        pairs = zip(columns, numbers.split(), strict=True)
        figures = {name: float(value) for name, value in pairs if value != "-"}
        rows.append(PublishedRow(system.strip(), figures))
    return tuple(rows)


# The tables are copied digit by digit, in the layout of their source, so that they can be compared.
_CLARE = "Hao et al., arXiv 2506.18246"
# Of RefCOCOg, the table of CLARE has the split by "umd", and that of RefCLIP the split by
# "google". Both have RefCOCO and RefCOCO+, which are the first six splits.
_REC_COLUMNS = tuple(name for name in REC_SPLITS.values() if name != _VAL_G)
_WEAK_REC_COLUMNS = (*_REC_COLUMNS[:6], _VAL_G, _REFERIT_TEST)

REIR = PublishedTable(
    source=f"{_CLARE}, table of REIR results",
    note="Their released evaluator uses definition A and lets each photo's own expression choose "
    "its candidates; compare these with our row 'leaky, A'.",
    columns=REIR_COLUMNS,
    rows=_rows(
        REIR_COLUMNS,
        """
CLIP-B, DeepSeek-VL2-Tiny       | 11.15 21.84 26.89  8.98 18.00 23.50  5.32 10.51 13.48
CLIP-L, DeepSeek-VL2            | 13.31 26.45 32.79 12.85 25.41 31.53 11.02 21.42 26.50
CLIP-L, SimVG-L                 | 12.01 25.68 31.78 10.16 23.79 30.04  7.31 20.75 21.21
EVA-CLIP-B, DeepSeek-VL2-Tiny   | 12.82 24.58 29.52 11.56 21.08 25.18  6.05 12.42 14.80
EVA-CLIP-L, DeepSeek-VL2        | 16.38 29.89 36.21 15.77 28.73 34.78 13.32 24.18 29.15
EVA-CLIP-L, SimVG-L             | 15.92 29.04 36.22 14.78 27.63 33.39  8.06 20.38 28.41
SigLIP-B, DeepSeek-VL2-Tiny     | 15.26 27.43 32.93 13.27 23.60 28.34  7.63 13.53 16.09
SigLIP-L, DeepSeek-VL2          | 18.52 33.22 39.48 17.82 31.90 37.84 15.04 26.74 31.50
SigLIP-L, SimVG-L               | 17.77 33.22 38.71 15.10 31.42 35.99  8.74 25.27 27.41
CLARE-ViT-B                     | 28.47 49.50 56.85 25.96 42.85 48.57 19.38 31.53 35.48
CLARE-ViT-L                     | 29.53 50.56 56.98 28.03 47.07 53.34 21.12 35.80 40.35
""",
    ),
)
"""Rows with two models are two-stage systems: an image retriever, then a grounding model."""

REC = PublishedTable(
    source=f"{_CLARE}, table of REC results",
    note="P@.5. These models see the pixels and the expression together, or let the expression "
    "choose among all candidates; compare them with our row 'by expression'.",
    columns=_REC_COLUMNS,
    rows=_rows(
        _REC_COLUMNS,
        """
MAttNet, RN101          | 76.40 80.43 69.28 64.93 70.26 56.01 66.58 67.27
CM-Att-Erase, RN101     | 78.35 83.14 71.32 68.09 73.65 58.03 67.99 68.67
DGA, VGG16              |   -   78.42 65.53   -   69.07 51.99   -   63.28
RvG-Tree, RN101         | 75.06 78.61 69.85 63.51 67.45 56.66 66.95 66.51
NMTree, RN101           | 76.41 81.21 70.09 66.46 72.02 57.52 65.87 66.44
CRIS, RN101             | 70.47 73.18 66.10 62.27 68.06 53.68 59.87 60.36
LAVT, Swin-B            | 74.46 76.89 70.94 65.81 70.97 59.23 63.34 63.62
TransVG++, ViT-B        | 86.28 88.37 80.97 75.39 80.45 66.28 76.18 76.30
MDETR                   | 86.75 89.58 81.41 79.52 84.09 70.62 81.64 80.89
Dyn.MDETR, ViT-B        | 85.97 88.82 80.12 74.83 81.70 63.44 72.21 74.14
SimVG, ViT-B            | 87.07 89.04 83.57 78.84 83.64 70.67 79.82 79.93
Shikra-7B               | 87.01 90.60 80.20 81.60 87.40 72.10 82.30 82.20
Ferret-7B               | 87.49 91.35 82.45 80.78 87.38 73.14 83.93 84.76
InternVL2-8B            | 87.10 91.10 80.70 79.80 87.90 71.40 82.70 82.70
CLARE, ViT-B            | 90.22 91.18 88.74 78.53 81.60 72.49 83.30 84.91
CLARE, ViT-L            | 91.40 91.95 89.98 80.11 83.25 74.43 86.30 86.70
""",
    ),
)

WEAK_REC = PublishedTable(
    source="Jin et al., RefCLIP, CVPR 2023, and its repository",
    note="P@.5 of models that were trained without boxes of these data sets: RefCLIP, and other "
    "models that were trained on the boxes that RefCLIP found. Their boxes are not clipped at the "
    "edges of the photo. Others who trained RefCLIP reached 2 to 3 points less on RefCOCO.",
    columns=_WEAK_REC_COLUMNS,
    rows=_rows(
        _WEAK_REC_COLUMNS,
        """
RefCLIP                 | 60.36 58.58 57.13 40.39 40.45 38.86 47.87 39.58
RefCLIP, then RealGIN   | 59.43 58.49 57.36 37.08 38.70 35.82 46.10 37.56
RefCLIP, then SimREC    | 62.57 62.70 61.22 39.13 40.81 36.59 45.68 42.33
RefCLIP, then TransVG   | 64.08 63.67 63.93 39.32 39.54 36.29 45.70 42.64
RefCLIP, then MAttNet   | 69.31 67.23 71.27 43.01 44.80 41.09 51.31   -
""",
    ),
    title="Comparison with models trained without boxes",
)

TIR = PublishedTable(
    source="ObjEmbed, arXiv 2602.01753, table 4",
    note="Image recall at 1 with the same expressions, as measured by the authors of ObjEmbed; we "
    "know of no results of CLARE on this task.",
    columns=("r1",),
    rows=_rows(
        ("r1",),
        """
CLIP ViT-L/14               | 16.0
MetaCLIP2 H/14              | 19.2
SigLIP2 So/16               | 22.9
FG-CLIP2 So/16              | 27.3
Qwen3-VL-Embedding-2B       | 28.0
Qwen3-VL-Embedding-8B       | 32.6
QQMM-embed-v2-7B            | 32.7
ObjEmbed-2B                 | 37.5
ObjEmbed-4B                 | 39.3
""",
    ),
)

SOREC_FIGURES = ("macc", "acc50", "acc75")
_SOREC_COLUMNS = tuple(
    f"{split}_{name}" for split in SOREC_SPLITS.values() for name in SOREC_FIGURES
)

SOREC = PublishedTable(
    source="Goto et al., arXiv 2510.03701, ICCV 2025, and its repository",
    note="All of these are MM-GroundingDINO, which reads the expression together with the pixels "
    "of the photo, as every localizer does; an encoder ranks instances that were chosen without "
    "it. Train-S and Train-L are the two training sets of SOREC.",
    columns=_SOREC_COLUMNS,
    rows=_rows(
        _SOREC_COLUMNS,
        """
Zero-shot                                 |  0.2    -    -   0.3  1.0  0.1   0.0  0.2  0.0
Full fine-tuning, Train-S                 |    -    -    -  35.9 58.6 38.8  23.0 43.6 21.9
CoOp, Train-S                             |    -    -    -  24.2 40.1 25.8  15.5 29.6 14.6
PIZA-CoOp, Train-S                        |    -    -    -  29.4 41.2 34.2  21.9 33.8 24.3
LoRA, Train-S                             |    -    -    -  26.2 43.1 28.1  17.0 32.5 15.9
PIZA-LoRA, Train-S                        |    -    -    -  33.8 46.6 39.2  25.8 38.7 28.9
Adapter+, Train-S                         | 26.0 48.1 24.8  32.0 55.0 33.3  20.3 40.4 17.9
PIZA-Adapter+, Train-S, no zoom embedding | 36.7 53.2 41.7  42.8 59.2 49.9  30.3 45.8 34.0
PIZA-Adapter+, Train-S                    | 36.8 53.5 41.8  43.1 59.6 50.1  30.4 45.9 34.1
Full fine-tuning, Train-L                 | 37.4    -    -  43.8 69.6 48.0  30.5 55.6 29.8
CoOp, Train-L                             |    -    -    -  27.5 46.5 28.7  17.5 34.8 15.9
PIZA-CoOp, Train-L                        |    -    -    -  33.4 46.8 38.7  24.4 37.6 26.9
LoRA, Train-L                             | 25.2    -    -  30.7 50.2 33.0  19.7 37.3 18.8
PIZA-LoRA, Train-L                        | 34.5    -    -  39.3 54.0 45.5  29.0 43.4 32.4
Adapter+, Train-L                         | 34.6    -    -  40.7 65.9 44.4  27.6 51.3 26.6
PIZA-Adapter+, Train-L                    | 39.0    -    -  45.1 66.2 51.7  31.7 52.2 33.6
""",
    ),
)

RESEDIS = PublishedTable(
    source="Huang et al., arXiv 2506.15180",
    note="Image recall at 1 of the authors' zero-shot baseline: crops of candidates, a frozen "
    "image-text model and a relation step. We know of no published figures of the other metrics.",
    columns=("r1",),
    rows=_rows(
        ("r1",),
        """
baseline, candidates of YOLOv8  | 21.22
baseline, true boxes            | 23.33
""",
    ),
)
