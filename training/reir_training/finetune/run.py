"""Fine-tunes the model of a gallery on sentences about its photos.

The parts, each of which is skipped if an earlier run with the same output folder has finished it:

    before    how well the model finds what held-out sentences describe
    weak      a weakly supervised model learns from the training sentences, without boxes
    labels    it finds their boxes; those that the mirrored photo confirms are kept
    tuned     `clare-nano` learns from these labels
    blend     old and new weights are blended, and the checkpoint is written and calibrated
    after     how well the new checkpoint finds the held-out sentences
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import reir
from reir.checkpoint import load_encoder
from reir.cores import num_cores
from reir.datasets import read_reircoco, write_photo_sentences, write_reircoco
from reir.datasets.dataset import ReferringDataset
from reir.errors import DataError
from reir.evaluate import Encoding
from reir.models.weak_rec.localizer import load_weak_localizer
from reir.operations.canary import to_line
from reir.query.presence import FILE as CALIBRATION
from reir_training.config import DataSource, NanoTrainConfig
from reir_training.finetune.blend import MAX_SHARE, choose_share, shares_up_to
from reir_training.finetune.final import BlendedModels
from reir_training.finetune.measure import Ranks, measure
from reir_training.finetune.pairs import GalleryPairs, canaries_of_pairs, split_pairs
from reir_training.finetune.photos import gather_photos
from reir_training.finetune.recipe import EPOCHS, tune_settings, weak_settings
from reir_training.finetune.remembered import RememberedSet
from reir_training.finetune.report import (
    MIN_HELD_OUT,
    TOO_FEW_AHEAD,
    Comparison,
    FinetuneReport,
)
from reir_training.finetune.start import StartModel
from reir_training.finetune.work import OutputFolder
from reir_training.pseudo_labels.agreement import AgreementFilter
from reir_training.pseudo_labels.labels import PseudoLabels, label_sentences
from reir_training.report.calibrate import calibrate_checkpoint
from reir_training.run.driver import run

logger = logging.getLogger(__name__)

PHOTOS, SENTENCES, LABELS = "photos", "sentences.jsonl", "labels.json"
CANARIES, REPORT, CHECKPOINT = "canaries.jsonl", "report.json", "checkpoint"
MIN_LABELED = 4
"""Photos with a label that are needed at least: to train on, and to choose the share on."""

Progress = Callable[[int, int], None]
ShowProgress = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of a part, given its name in words."""
Trainer = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The settings of a fine-tune.

    Attributes:
        epochs: of the training of `clare-nano`.
        held_out: share of the photos that the result is measured on.
        max_share: largest share of the new weights in the result; more learns and forgets more.
        fold: share of the training photos on which the blend is chosen.
    """

    epochs: int = EPOCHS
    held_out: float = 0.2
    max_share: float = MAX_SHARE
    fold: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A fine-tune of one gallery; `run` goes through its parts.

    Attributes:
        gallery: name of the gallery.
        start: its model.
        pairs: sentences about its photos.
        output: folder for all results.
        options: settings.
        remembered: where it is measured what the model forgets.
        show: shows progress.
        store: where the gallery is, for the command in the report; None for the default store.
        trainer: trains a model; `reir_training.run.driver.run`, or a stand-in for it.
    """

    gallery: str
    start: StartModel
    pairs: GalleryPairs
    output: Path
    options: FinetuneOptions
    remembered: RememberedSet
    show: ShowProgress
    store: str | None = None
    trainer: Trainer = run
    train: ReferringDataset = field(init=False)
    held_out: ReferringDataset = field(init=False)

    def __post_init__(self) -> None:
        """Hold out photos, and warn if they are too few to tell whether it helped.

        Raises:
            DataError: too few photos are left to train on.
        """
        train, held_out = split_pairs(self.pairs.dataset, self.options.held_out)
        if len(train.images) < MIN_LABELED:
            raise DataError(
                f"{self.pairs.dataset.source}: at least {MIN_LABELED} photos are needed to train "
                f"on, besides the held-out ones, got {len(train.images)}; add sentences about more "
                f"photos"
            )
        num = len({each.image_id for each in held_out.expressions})
        if num < MIN_HELD_OUT:
            # Told before the training, which takes long.
            logger.warning("%s", TOO_FEW_AHEAD.format(photos=num, needed=MIN_HELD_OUT))
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "held_out", held_out)

    @property
    def photos(self) -> Path:
        """Folder of the photos."""
        return self.output / PHOTOS

    @property
    def checkpoint(self) -> Path:
        """The folder of the new checkpoint."""
        return self.output / CHECKPOINT

    def run(self) -> FinetuneReport:
        """Do all parts, and return the report.

        Raises:
            ConfigError: the output folder has the results of another fine-tune.
            DataError: photos cannot be read, or too few sentences get a box.
        """
        request = {
            # Another release may train with other settings.
            "version": reir.__version__,
            "gallery": self.gallery,
            "sentences": self.pairs.digest,
            "checkpoint": self.start.digest,
            "remembered": self.remembered.digest,
            **asdict(self.options),
        }
        folder = OutputFolder(self.output, request)
        # In every run and not as a part: a photo may have moved, which breaks the link to it.
        gather_photos(self.photos, self.pairs.uris)
        before = folder.part("before", lambda: self._measure(self.start.folder, "measuring before"))
        if self.has_unlabeled:
            folder.part("weak", self._train_weak)
        labels = folder.part("labels", self._label)
        folder.part("tuned", self._tune)
        blend = folder.part("blend", self._blend)
        after = folder.part("after", lambda: self._measure(self.checkpoint, "measuring after"))
        return self._report(before, labels, blend, after, folder.minutes())

    @property
    def has_unlabeled(self) -> bool:
        """Whether there are training sentences without a box."""
        return any(each.instance_id is None for each in self.train.expressions)

    def _measure(self, checkpoint: Path, what: str) -> dict[str, Any]:
        encoder = load_encoder(checkpoint)
        sets = {
            "held_out": (self.held_out, self.photos),
            "remembered": (self.remembered.dataset, self.remembered.images_dir),
        }
        found = {}
        for name, (dataset, images_dir) in sets.items():
            with self.show(what) as progress:
                found[name] = measure(encoder, dataset, images_dir, progress).to_dict()
        return found

    def _train_weak(self) -> dict[str, Any]:
        write_photo_sentences(self.train, self.output / SENTENCES)
        source = DataSource(
            format="sentences", path=self.output, images=PHOTOS, annotations=SENTENCES
        )
        checkpoint = self.trainer(
            "weak-rec",
            weak_settings(source, len(self.train.expressions)),
            output=self.output / "weak",
            stage="all",
            init=self.start.folder,
            num_workers=1,
            use_gpu=False,
        )
        return {"checkpoint": str(checkpoint.relative_to(self.output.resolve()))}

    def _label(self) -> dict[str, Any]:
        num = len(self.train.expressions)
        labels = PseudoLabels(self.train, num_sentences=num, num_drawn=num, refused={})
        if self.has_unlabeled:
            agreement = AgreementFilter(load_weak_localizer(str(self.output / "weak" / CHECKPOINT)))
            with self.show("finding boxes") as progress:
                labels = label_sentences(self.train, self.photos, agreement, progress)
        photos = {each.image_id for each in labels.dataset.expressions}
        # Photos without a sentence would be drawn into the fold, where they are of no use.
        write_reircoco(labels.dataset.of_images(photos), self.output / LABELS)
        if len(photos) < MIN_LABELED:
            raise DataError(
                f"at least {MIN_LABELED} photos with a box that both looks agree on are needed, "
                f"got {len(photos)} of {len(self.train.images)}; add sentences about more photos, "
                f"or draw boxes for some of them"
            )
        return {**labels.to_dict(), "photos": len(photos)}

    def _tune_settings(self) -> NanoTrainConfig:
        # Derived from the stored labels, because `_blend` needs the same settings with the same
        # held-out photos, maybe in a later run that skips `_tune`.
        num = len(read_reircoco(self.output / LABELS).images)
        fold = max(1, round(self.options.fold * num))
        source = DataSource(
            format="reircoco",
            path=self.output,
            images=PHOTOS,
            annotations=LABELS,
            task="grounding",
            held_out=fold,
        )
        return tune_settings(source, num - fold, self.options.epochs)

    def _tune(self) -> dict[str, Any]:
        self.trainer(
            "clare-nano",
            self._tune_settings(),
            output=self.output / "tuned",
            stage="clia",
            init=self.start.folder,
            num_workers=1,
            use_gpu=False,
        )
        return {}

    def _blend(self) -> dict[str, Any]:
        models = BlendedModels(self.start.folder, self.output / "tuned", self._tune_settings())
        # With the sentences that got no box: the share is chosen by the right photo alone.
        fold = self.train.of_images(set(models.held_out))
        shares = shares_up_to(self.options.max_share)
        choice = choose_share(lambda share: models.rank(share, fold), shares)
        digest = models.save(self.checkpoint, choice)
        problem = self._calibrate(set(models.held_out))
        figures = {str(share): value for share, value in choice.figures.items()}
        return {
            "share": choice.share,
            "photo_p1_by_share": figures,
            "digest": digest,
            "calibrated": not problem,
            **({"not_calibrated": problem} if problem else {}),
        }

    def _calibrate(self, image_ids: set[str]) -> str:
        """Calibrate the new checkpoint on labeled photos that it was not trained on.

        Returns:
            Why it is not calibrated: there are too few such photos, or the old checkpoint has no
            calibration either. Empty if it is.
        """
        if not (self.start.folder / CALIBRATION).is_file():
            return "the old checkpoint is not calibrated either"
        labeled = read_reircoco(self.output / LABELS).of_images(image_ids)
        try:
            with self.show("calibrating") as progress:
                calibrate_checkpoint(
                    self.checkpoint,
                    load_encoder(self.checkpoint),
                    labeled,
                    self.photos,
                    labeled.expressions,
                    about={"annotations": LABELS, "split": "", "kind": ""},
                    how=Encoding(threads=num_cores(), progress=progress),
                )
        except DataError as error:  # the checkpoint is useful without a calibration
            return str(error)
        return ""

    def _report(
        self,
        before: Mapping[str, Any],
        labels: Mapping[str, Any],
        blend: Mapping[str, Any],
        after: Mapping[str, Any],
        minutes: Mapping[str, float],
    ) -> FinetuneReport:
        """Return the report, after writing it and the canaries into the output folder."""
        names = {"held_out": "held out", "remembered": f"about {self.remembered.name}"}
        held_out, remembered = (
            Comparison(text, Ranks.from_dict(before[name]), Ranks.from_dict(after[name]))
            for name, text in names.items()
        )
        everything = self.pairs.dataset
        canaries = canaries_of_pairs(self.held_out, self.pairs.uris)
        lines = "".join(f"{to_line(each)}\n" for each in canaries)
        (self.output / CANARIES).write_text(lines, encoding="utf-8")
        report = FinetuneReport(
            gallery=self.gallery,
            checkpoint=self.checkpoint,
            canaries=self.output / CANARIES,
            masks=self.start.masks,
            counts={
                "photos": len(everything.images),
                "sentences": len(everything.expressions),
                "with_box": len(everything.with_targets().expressions),
                "left_out": len(self.pairs.skipped),
                "held_out_photos": len(self.held_out.images),
                "held_out_sentences": len(self.held_out.expressions),
                "canaries": len(canaries),
            },
            labels=labels,
            blend=blend,
            held_out=held_out,
            remembered=remembered,
            minutes=minutes,
            feedback=self.pairs.feedback,
            store=self.store,
        )
        text = json.dumps(report.to_dict(), indent=2)
        (self.output / REPORT).write_text(text + "\n", encoding="utf-8")
        return report
