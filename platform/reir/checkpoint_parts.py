"""Optional parts of a checkpoint: modules that were trained after the model, beside its weights.

A part consists of `NAME.json` and `NAME.safetensors`, in float32. It records the digest of what it
was trained on, and works with nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from reir.errors import CheckpointError

FORMAT = 1
Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class CheckpointPart:
    """A kind of part.

    Attributes:
        name: of its files, without the ending.
        label: its name in messages.
        trained_on: what the digest identifies, in messages.
        stage: the stage of `reir train` that trains it.
    """

    name: str
    label: str
    trained_on: str
    stage: str

    @property
    def config_file(self) -> str:
        """Name of the file with shape, digest and training."""
        return f"{self.name}.json"

    @property
    def weights_file(self) -> str:
        """Name of the file with the weights."""
        return f"{self.name}.safetensors"

    def is_in(self, folder: Path) -> bool:
        """Whether a checkpoint directory has this part."""
        return (folder / self.weights_file).is_file()

    def save(
        self,
        folder: Path,
        module: nn.Module,
        shape: Mapping[str, Any],
        digest: str,
        about: Mapping[str, Any],
    ) -> None:
        """Write the part into a checkpoint directory; its other files stay as they are.

        Args:
            folder: of the checkpoint.
            module: on any device.
            shape: arguments from which `load` builds the module.
            digest: of what it was trained on.
            about: JSON values to store under "training" (data, steps, metrics).
        """
        config = {
            "format": FORMAT,
            "digest": digest,
            "model_config": dict(shape),
            "training": dict(about),
        }
        text = json.dumps(config, indent=2, sort_keys=True)
        # safetensors refuses tensors that are not contiguous.
        weights = {k: v.float().cpu().contiguous() for k, v in module.state_dict().items()}
        # The weights go first and come last: `is_in` looks for them, so neither half a part nor old
        # weights with a new description are taken for a part.
        (folder / self.weights_file).unlink(missing_ok=True)
        (folder / self.config_file).write_text(text + "\n", encoding="utf-8")
        save_file(weights, folder / self.weights_file)

    def load(self, folder: Path, build: Callable[[dict[str, Any]], Part], digest: str) -> Part:
        """Load the part of a checkpoint in eval mode.

        Args:
            folder: of a checkpoint that has the part.
            build: builds the module from its shape.
            digest: of what it must have been trained on.

        Raises:
            CheckpointError: it has another format, was trained on something else, or cannot be
                loaded.
        """
        with self._errors(folder):
            config = json.loads((folder / self.config_file).read_text(encoding="utf-8"))
            version, trained_on, shape = (config[k] for k in ("format", "digest", "model_config"))
        if version != FORMAT:
            raise CheckpointError(
                f"{self.label} in {folder} has format {version}, but this release reads format "
                f"{FORMAT}; use the release that wrote it, train one with "
                f"`reir train --stage {self.stage} --init {folder}`, or delete {self.weights_file}"
            )
        if trained_on != digest:
            raise CheckpointError(
                f"{self.label} in {folder} was trained on {self.trained_on} {trained_on[:12]}, but "
                f"the checkpoint has {digest[:12]}; train one with "
                f"`reir train --stage {self.stage} --init {folder}`, or delete {self.weights_file}"
            )
        with self._errors(folder):
            module = build(shape)
            module.load_state_dict(load_file(folder / self.weights_file))
        return module.eval().requires_grad_(False)

    def copy(self, source: Path, folder: Path) -> None:
        """Copy the part to another checkpoint directory, if `source` has it."""
        if self.is_in(source) and not folder.samefile(source):
            # As in `save`, the weights go first and come last: half a copy is not taken for a part.
            (folder / self.weights_file).unlink(missing_ok=True)
            for name in (self.config_file, self.weights_file):
                shutil.copyfile(source / name, folder / name)

    @contextmanager
    def _errors(self, folder: Path) -> Iterator[None]:
        """Turn errors of missing or damaged files into one that names the folder."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                # torch adds a line for each parameter that does not fit.
                f"cannot load {self.label} in {folder}: {str(error).splitlines()[0]}; "
                f"{self.weights_file} and {self.config_file} must come from one `reir train` run"
            ) from error
