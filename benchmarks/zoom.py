"""What zoom finds in large photos, against whole photos and tiles: recall, BR@1, cost, memory.

    python benchmarks/zoom.py [--split val]

Mosaics of held-out photos (`reir_training.zoom.mosaics`): 6 to 16 photos in a picture of 3,000 to
4,000 px, and dense mosaics, which are full of photos. Settings were chosen on "val"; the default
split is the test photos of the recipe, on which nothing was chosen. The other set is COCO photos at
their original size of 640 px, with parts and tiles of half that size.

`tiles` are the tiles of `reir index --large-photos tiles`; `tiles_equal` are larger tiles, which
cost about as much as zoom. All ways may keep equally many instances of a photo. Recall is the share
of annotated instances (small: below 32 x 32 px; targets: with an expression) that a stored box
overlaps by an IoU of .5. BR@1 ranks the instances of all mosaics for each expression. The cost is
the processor time of one thread, and the number of views and of instances that were encoded; the
ways take turns. Peak memory is that of `reir index` on one photo of 12,000 x 9,000 px.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from _indexing import TEST_PHOTOS, encoder_of, parser_of
from _report import write_report
from PIL import Image

from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import ReferringDataset
from reir.datasets.photos import read_photos
from reir.evaluate.encoded_gallery import queries_of
from reir.images.boxes import pairwise_iou
from reir.images.decode import read_image
from reir.images.large_photos import with_views
from reir.images.tiling import Tiling
from reir.images.views import ViewSettings
from reir.images.zoom import Zoom
from reir.metrics import Gallery, reir_ranks
from reir.models.delegating_encoder import DelegatingEncoder
from reir.models.interfaces import BoxProposer, InstanceEncoder
from reir.records import FloatArray, Instances, RgbImage
from reir_testing import data_dir
from reir_training.data.examples import TEST, set_test_photos_aside
from reir_training.zoom.mosaics import MosaicSet, MosaicSettings

Figures = dict[str, float | int]
SMALL_PX = 32
IOU = 0.5
EQUAL_SIDE_PX = 1200
HALF_PX, HALF_EQUAL_PX = 320, 416
HUGE_PX = (12_000, 9_000)


class CountingEncoder(DelegatingEncoder):
    """Counts the views and instances that another encoder encodes."""

    masks = False

    def __init__(self, encoder: InstanceEncoder) -> None:
        super().__init__(encoder)
        self.views = self.instances = 0

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each image, and count."""
        found = self._encoder.encode_images(images)
        self.views += len(images)
        self.instances += sum(map(len, found))
        return found

    def propose_boxes(self, image: RgbImage, num_boxes: int) -> tuple[FloatArray, FloatArray]:
        """See `BoxProposer.propose_boxes`; this look is not counted as a view."""
        if not isinstance(self._encoder, BoxProposer):
            raise TypeError(f"{type(self._encoder).__name__} cannot propose boxes")
        return self._encoder.propose_boxes(image, num_boxes)


@dataclass
class Way:
    """One way to encode large photos, what it found, and its cost."""

    counting: CountingEncoder
    encoder: InstanceEncoder
    found: list[Instances] = field(default_factory=list)
    cpu_s: float = 0.0

    @classmethod
    def of(cls, encoder: InstanceEncoder, views: ViewSettings | None) -> Way:
        """Build a way around an encoder."""
        counting = CountingEncoder(encoder)
        return cls(counting, with_views(counting, views))

    def encode(self, photo: RgbImage) -> None:
        """Encode a photo."""
        started = time.process_time()
        self.found += self.encoder.encode_images([photo])
        self.cpu_s += time.process_time() - started

    def figures(self, dataset: ReferringDataset) -> Figures:
        """Return recall, BR@1 and the mean cost of a photo."""
        num = len(self.found)
        hits, small, described = self._hits(dataset)
        figures: Figures = {
            "recall": round(float(hits.mean()), 4),
            "recall_small": round(float(hits[small].mean()), 4),
            "cpu_s": round(self.cpu_s / num, 3),
            "views": round(self.counting.views / num, 2),
            "encoded": round(self.counting.instances / num, 1),
            "stored": round(sum(map(len, self.found)) / num, 1),
        }
        if described.any():
            figures["recall_targets"] = round(float(hits[described].mean()), 4)
            figures["br1"] = round(self._br1(dataset), 4)
        return figures

    def _hits(self, dataset: ReferringDataset) -> tuple[npt.NDArray[np.bool_], ...]:
        """Return which annotated instances were found, which are small, which are described."""
        targets = {text.instance_id for text in dataset.expressions}
        rows = []
        for image, found in zip(dataset.images, self.found, strict=True):
            size_px = np.array([image.width_px, image.height_px] * 2)
            for each in dataset.instances:
                if each.image_id != image.image_id or each.is_crowd:
                    continue
                x1, y1, x2, y2 = each.box_xyxy_px
                iou = pairwise_iou(np.array([each.box_xyxy_px]) / size_px, found.boxes)
                rows.append(
                    (
                        bool((iou >= IOU).any()),
                        (x2 - x1) * (y2 - y1) < SMALL_PX**2,
                        each.instance_id in targets,
                    )
                )
        hits, small, described = np.array(rows, dtype=bool).T
        return hits, small, described

    def _br1(self, dataset: ReferringDataset) -> float:
        """Return the share of expressions whose best instance of all photos is the right one."""
        size_px = np.array([(each.width_px, each.height_px) * 2 for each in dataset.images])
        images = np.repeat(np.arange(len(self.found)), [len(each) for each in self.found])
        gallery = Gallery(
            np.concatenate([each.vectors for each in self.found]),
            images,
            np.concatenate([each.boxes for each in self.found]) * size_px[images],
        )
        queries = queries_of(self.counting, dataset, dataset.first_expressions().expressions)
        return float(reir_ranks(queries, gallery).hits_b(1, IOU).mean())


def photos_dir() -> Path:
    """Return the folder of real photos."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    return data


def compare(
    encoder: InstanceEncoder,
    settings: Mapping[str, ViewSettings | None],
    dataset: ReferringDataset,
    draw: Callable[[int], RgbImage],
) -> Figures:
    """Encode all photos in each way, in turn; return the figures as `way.figure`."""
    ways = {name: Way.of(encoder, views) for name, views in settings.items()}
    encoder.encode_images([draw(0)])  # an encoder may build its engines at the first photo
    for number in range(len(dataset.images)):
        photo = draw(number)
        for way in ways.values():
            way.encode(photo)
        print(f"\r{number + 1} of {len(dataset.images)} photos", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {
        f"{name}.{key}": value
        for name, way in ways.items()
        for key, value in way.figures(dataset).items()
    }


def ways_of(zoom: Zoom, side_px: int, equal_px: int) -> dict[str, ViewSettings | None]:
    """Return the ways to compare; tiles have no limit that zoom does not have."""
    tiles = Tiling(above_px=zoom.above_px, times=zoom.times, side_px=side_px)
    return {
        "whole": None,
        "zoom": zoom,
        "tiles": tiles,
        "tiles_equal": replace(tiles, side_px=equal_px),
    }


def mosaics(encoder: InstanceEncoder, arguments: argparse.Namespace) -> Figures:
    """Measure on sparse and dense mosaics of one split."""
    data = photos_dir()
    photos = set_test_photos_aside(read_photos(data / "photos"), TEST_PHOTOS)
    figures: Figures = {}
    for name, dense, limit in (
        ("mosaics", False, arguments.mosaics),
        ("dense", True, arguments.dense),
    ):
        made = MosaicSet(
            photos.split(arguments.split), data / "photos" / "images", MosaicSettings(dense=dense)
        )
        dataset = made.dataset.first_images(limit)
        found = compare(
            encoder, ways_of(Zoom(), Tiling().side_px, EQUAL_SIDE_PX), dataset, made.draw
        )
        figures[f"{name}.pictures"] = len(dataset.images)
        figures[f"{name}.expressions"] = len(dataset.first_expressions().expressions)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    return figures


def original_photos(encoder: InstanceEncoder, count: int) -> Figures:
    """Measure on single photos at their original size."""
    folder = photos_dir() / "photos_masks"
    dataset = read_coco_instances(folder / "instances.json").first_images(count)

    def draw(number: int) -> RgbImage:
        return read_image(folder / "images" / dataset.images[number].file_name)

    ways = ways_of(Zoom(above_px=1, side_px=HALF_PX), HALF_PX, HALF_EQUAL_PX)
    found = compare(encoder, ways, dataset, draw)
    return {"photos.count": len(dataset.images)} | {f"photos.{k}": v for k, v in found.items()}


def ratios(figures: Figures) -> Figures:
    """Return the figures that the mosaics are measured for."""

    def ratio(key: str, one: str, other: str) -> float:
        return round(figures[f"mosaics.{one}.{key}"] / figures[f"mosaics.{other}.{key}"], 3)

    return {
        "recall_ratio": ratio("recall_targets", "zoom", "whole"),
        "br1_ratio": ratio("br1", "zoom", "whole"),
        "cost_ratio": ratio("cpu_s", "zoom", "tiles"),
        "views_ratio": ratio("views", "zoom", "tiles"),
        "recall_tiles_ratio": ratio("recall_targets", "zoom", "tiles"),
    }


def peak_memory() -> Figures:
    """Return the peak memory, in MiB, of indexing a small and a huge photo with zoom."""
    figures: Figures = {}
    for name, size_px in (("small", (640, 480)), ("huge", HUGE_PX)):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "photos"
            folder.mkdir()
            # In a process of its own: a new process starts with the peak of the one that starts it.
            draw = get_context("spawn").Process(target=draw_photo, args=(folder, size_px))
            draw.start()
            draw.join()
            report = index_in_a_process(folder, Path(work) / "store")
        if report["new"] != 1:
            raise SystemExit(f"the photo of {size_px} px was not indexed: {report}")
        figures[f"memory.{name}_mib"] = round(report["peak_rss_bytes"] / 2**20)
        figures[f"memory.{name}_instances"] = report["num_instances"]
    return figures


def draw_photo(folder: Path, size_px: tuple[int, int]) -> None:
    """Save a mosaic of 100 photos as a JPEG of this size."""
    data = photos_dir()
    settings = MosaicSettings(num_photos=(100, 100), side_px=HUGE_PX[::-1])
    made = MosaicSet(read_photos(data / "photos"), data / "photos" / "images", settings)
    Image.fromarray(made.draw(0)).resize(size_px).save(folder / "photo.jpg", quality=90)


def index_in_a_process(folder: Path, store: Path) -> dict[str, int]:
    """Run `reir index --large-photos zoom` and return its report."""
    command = [sys.executable, "-c", "from reir.cli.main import main; main()", "index", str(folder)]
    options = ["--store", str(store), "--large-photos", "zoom", "--json"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    report: dict[str, int] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--split", default=TEST, help='"val" or "test".')
    parser.add_argument("--mosaics", type=int, help="Number of mosaics; default: all.")
    parser.add_argument("--dense", type=int, default=2, help="Number of dense mosaics.")
    parser.add_argument("--photos", type=int, default=60, help="Number of single photos.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = peak_memory()
    encoder = encoder_of(arguments)
    figures |= mosaics(encoder, arguments)
    figures |= original_photos(encoder, arguments.photos)
    figures = {f"zoom.{key}": value for key, value in (ratios(figures) | figures).items()}
    for key, value in figures.items():
        print(f"{key:40} {value}")
    if arguments.split == TEST:
        write_report("zoom", figures)


if __name__ == "__main__":
    main()
