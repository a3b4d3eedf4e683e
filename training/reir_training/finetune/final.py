"""The final checkpoint of a fine-tune: a blend of the old and the tuned weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reir.checkpoint import COLOR_HEAD, MASK_HEAD, load_model, read_config, save_checkpoint
from reir.datasets.dataset import ReferringDataset
from reir.models.nano.model import ClareNano
from reir.query.presence import save_background
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TRAIN, VAL
from reir_training.data.leakage import training_photos
from reir_training.finetune.blend import ShareChoice, blended
from reir_training.finetune.measure import Ranks, rank_sentences
from reir_training.nano.background import background_vectors
from reir_training.nano.cache import FrozenCache, build_cache
from reir_training.nano.query_bank import fill_query_bank
from reir_training.report.model_card import write_finetune_card
from reir_training.run.storage import CHECKPOINT
from reir_training.run.validate import cached_gallery, text_vectors


class BlendedModels:
    """The models between the checkpoint that a run started from and the one that it wrote.

    Args:
        start: checkpoint directory that the run started from.
        run: output folder of the run.
        config: its settings.

    Raises:
        CheckpointError: a checkpoint is incomplete or damaged.
    """

    def __init__(self, start: Path, run: Path, config: NanoTrainConfig) -> None:
        self._start, self._run = start, run
        old, self._tokenizer = load_model(start)
        self._model, _ = load_model(run / CHECKPOINT)
        # Copied, because the tensors of a state dict are those of the model, which will change.
        self._old, self._new = copy.deepcopy(
            (dict(old.state_dict()), dict(self._model.state_dict()))
        )
        # The run has filled the bank with its own sentences only; the old bank has the others.
        bank = [name for name in self._old if name.startswith("bank.")]
        self._new |= {name: self._old[name] for name in bank}
        self._photos = training_photos(config)
        self._cache = FrozenCache(build_cache(run / "cache", old, self._photos))

    @property
    def held_out(self) -> list[str]:
        """The names of the photos that the run did not train on."""
        return [photo.path.name for photo in self._photos if photo.split == VAL]

    @torch.inference_mode()
    def rank(self, share: float, dataset: ReferringDataset) -> Ranks:
        """Rank the held-out photos for sentences about them, with a share of the new weights.

        Args:
            share: of the new weights.
            dataset: the held-out photos, whose file names are those of the run.
        """
        row_of = {photo.path.name: row for row, photo in enumerate(self._photos)}
        model = self._with_share(share)
        rows = [row_of[image.file_name] for image in dataset.images]
        gallery = cached_gallery(model, self._cache, rows)
        texts = text_vectors(model, self._tokenizer, [each.text for each in dataset.expressions])
        # Only photos are ranked: the boxes of the cache are not in pixels.
        bare = dataset.with_expressions(
            replace(each, instance_id=None) for each in dataset.expressions
        )
        return rank_sentences(gallery, texts, bare)

    def save(self, folder: Path, choice: ShareChoice) -> str:
        """Write the checkpoint directory of the chosen share, and return its digest.

        The mask head and the color head of the old checkpoint fit the same crop network and text
        tower, and are kept. A re-ranker, a calibration and a zoom policy were made for other
        vectors, and are not.
        """
        model = copy.deepcopy(self._with_share(choice.share))
        rows = [row for row, photo in enumerate(self._photos) if photo.split == TRAIN]
        fill_query_bank(model, self._tokenizer, self._photos, self._cache, rows, extend=True)
        about = self._about(choice)
        digest = save_checkpoint(folder, model, self._tokenizer, about)
        vectors = background_vectors(model, self._cache, rows, half=False)
        save_background(folder, vectors, digest)
        write_finetune_card(folder, self._start, about)
        for part in (MASK_HEAD, COLOR_HEAD):
            part.copy(self._start, folder)
        return digest

    def _with_share(self, share: float) -> ClareNano:
        """Return the model with a share of the new weights; it is always the same object."""
        self._model.load_state_dict(blended(self._old, self._new, share))
        return self._model.eval()

    def _about(self, choice: ShareChoice) -> dict[str, Any]:
        """Return the metadata of the run, and what it started from."""
        about: dict[str, Any] = read_config(self._run / CHECKPOINT)["training"]
        started_from = read_config(self._start)
        return {
            **about,
            "started_from": started_from["digest"],
            "share_of_new_weights": choice.share,
        }
