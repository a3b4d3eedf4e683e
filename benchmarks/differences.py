"""Is the named difference right? Sentences with one planted wrong word, and the instance they mean.

    python benchmarks/differences.py --work FOLDER

Each expression of the held-out `val` photos gets one wrong word ("the red bus" becomes "the blue
bus"). The instance that it describes is then compared with the wrong sentence, as a search does
with a miss. A named difference is right if it names the planted word and restores the original one,
or for a planted object, if it names the class of the instance. Any other difference is wrong.

The margins were chosen on every second probe; this benchmark measures on the other ones. A false
alarm is a difference that is named although the sentence is right. As in `reir search`, colors are
compared with the pixels of the instance. FOLDER keeps encoded photos, which a second run reads
instead of encoding them again.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _indexing import encoder_of, parser_of
from _report import write_report

from reir.checkpoint import load_color_reader
from reir.datasets.generated_expressions import COLORS, names_color
from reir.datasets.photos import read_photos
from reir.datasets.wrong_words import ABSENT, SIDE
from reir.evaluate import Encoding, encode_gallery
from reir.evaluate.encoded_gallery import queries_of
from reir.evaluate.probes import described_rows, find_probes
from reir.images.decode import read_image
from reir.models.color_reading import ColorReading
from reir.models.interfaces import InstanceEncoder
from reir.query.differences import OBJECT, Alternatives, Comparison
from reir.query.stages import VerifyResult
from reir.records import FloatArray
from reir.results import Difference
from reir.text import normalize_expression, swap_left_right
from reir_testing import data_dir

TIMED, HITS = 50, 20


@dataclass(frozen=True)
class Trial:
    """A wrong sentence, and the instance that the right one describes.

    Attributes:
        kind: kind of the planted word, as in `reir.datasets.wrong_words`.
        right: the right sentence.
        wrong: the wrong sentence.
        category: class of the instance.
        vector: (D,) vector of the instance.
        colors, right_colors: what the pixels say about the colors of the wrong and of the right
            sentence.
    """

    kind: str
    right: str
    wrong: str
    category: str
    vector: FloatArray
    colors: VerifyResult
    right_colors: VerifyResult

    def restores(self, told: Difference) -> bool:
        """Whether a named difference names the planted word and the original one."""
        if told.kind == OBJECT:
            return self.kind == ABSENT and told.seen == self.category
        if told.kind == SIDE:
            return swap_left_right(self.wrong) == self.right
        places = re.finditer(rf"\b{told.wanted}\b", self.wrong)
        # The original color may be written otherwise: "dark" for black.
        return any(
            _same_colors(
                f"{each.string[: each.start()]}{told.seen}{each.string[each.end() :]}", self.right
            )
            for each in places
        )


def shares(trials: Sequence[Trial], alternatives: Alternatives) -> dict[str, float | int]:
    """Return precision and recall of the named differences, in all and for each kind."""
    planted = Counter(each.kind for each in trials)
    named: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for trial in trials:
        wrong = Comparison.of(trial.wrong)
        for told in wrong.differences(alternatives, trial.vector, trial.colors):
            kind = ABSENT if told.kind == OBJECT else told.kind
            named[kind] += 1
            right[kind] += trial.restores(told)
    figures: dict[str, float | int] = {
        "probes": len(trials),
        "precision": ratio(right.total(), named.total()),
        "recall": ratio(right.total(), len(trials)),
    }
    for kind, count in sorted(planted.items()):
        figures[f"probes.{kind}"] = count
        figures[f"recall.{kind}"] = ratio(right[kind], count)
        if named[kind]:
            figures[f"precision.{kind}"] = ratio(right[kind], named[kind])
    return figures


def false_alarms(trials: Sequence[Trial], alternatives: Alternatives) -> float:
    """Return the share of right sentences for which a difference is named."""
    instances = {each.right: each for each in trials}
    told = [
        bool(Comparison.of(text).differences(alternatives, each.vector, each.right_colors))
        for text, each in instances.items()
    ]
    return ratio(sum(told), len(told))


def usual_ms(trials: Sequence[Trial], alternatives: Alternatives) -> float:
    """Return the median time in milliseconds to compare a sentence with the hits of a page."""
    spent = []
    for trial in trials[:TIMED]:
        start = time.perf_counter()
        comparison = Comparison.of(trial.wrong)
        for other in trials[:HITS]:
            comparison.differences(alternatives, other.vector)
        spent.append(1e3 * (time.perf_counter() - start))
    return round(float(np.median(spent)), 1)


def _same_colors(sentence: str, other: str) -> bool:
    """Whether two sentences have the same words, where synonyms of a color count as the same."""
    first, second = (
        [COLORS.get(each, each) for each in text.split()] for text in (sentence, other)
    )
    return first == second


def ratio(part: int, whole: int) -> float:
    """Return a share, rounded; 0 of nothing."""
    return round(part / max(whole, 1), 4)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="Folder that keeps encoded photos.")
    arguments: argparse.Namespace = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    encoder = encoder_of(arguments)
    trials = planted(encoder, root / "photos", arguments)
    alternatives = Alternatives.of(encoder.encode_expressions(Alternatives.SENTENCES))
    found = shares(trials, alternatives) | {
        "false_alarms": false_alarms(trials, alternatives),
        "ms": usual_ms(trials, alternatives),
    }
    figures = {f"differs.{name}": value for name, value in found.items()}
    for name, value in figures.items():
        print(f"{name:32} {value}")
    write_report("differences", figures)


def planted(encoder: InstanceEncoder, folder: Path, arguments: argparse.Namespace) -> list[Trial]:
    """Return a trial for every second probe whose instance was found."""
    held_out = read_photos(folder).split("val")
    how = Encoding(work=arguments.work)
    gallery = encode_gallery(encoder, held_out, folder / "images", how=how).arrays
    probes = list(find_probes(held_out))
    rows = described_rows(queries_of(encoder, held_out, [p.expression for p in probes]), gallery)
    reader = load_color_reader(arguments.checkpoint, encoder)
    trials = []
    for probe, row in [each for each in zip(probes, rows, strict=True) if each[1] >= 0][1::2]:
        image = held_out.images_by_id[probe.expression.image_id]
        box = gallery.boxes_px[row] / np.array([image.width_px, image.height_px] * 2)
        wrong, right = map(normalize_expression, (probe.altered, probe.expression.text))
        asked = [(box.astype(np.float32), text) for text in (wrong, right)]
        colors: list[list[ColorReading]] = [[], []]
        if reader is not None and any(map(names_color, (wrong, right))):
            colors = reader.read(read_image(folder / "images" / image.file_name), asked)
        trials.append(
            Trial(
                kind=probe.name,
                right=right,
                wrong=wrong,
                category=held_out.instances_by_id[str(probe.expression.instance_id)].category or "",
                vector=gallery.vectors[row],
                colors=tuple(colors[0]),
                right_colors=tuple(colors[1]),
            )
        )
    return trials


if __name__ == "__main__":
    main()
