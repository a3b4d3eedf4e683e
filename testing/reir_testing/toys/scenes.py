"""Scenes of toys with invented names, and sentences that describe one toy of a whole gallery.

The places of the toys and the grammar of the sentences are those of `reir_testing.scenes`. A model
that was trained on photos finds the toys, but does not know their names.
"""

# Shapes: H x W pixels of a scene

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reir.images.rle import encode
from reir.records import MaskRle, RgbImage
from reir_testing.fakes import PALETTE
from reir_testing.scene_expressions import SceneShape
from reir_testing.scenes import Scene, draw_ground, make_scenes
from reir_testing.toys.forms import FORMS, PATTERNS, draw_toy

SIDE_PX = 448
MAX_TOYS = 4
REPEAT = 0.4
"""Share of toys that have the name or the color of an earlier toy of the scene."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyScene(Scene):
    """A scene whose shapes are toys: `form` is a name, and `color` is a pattern and a color."""

    def mask(self, shape: SceneShape) -> MaskRle:
        """Return the pixels that one of its toys covers by half or more."""
        x1, y1, x2, y2 = self.box_px(shape)
        whole = np.zeros((self.side_px, self.side_px), dtype=bool)
        whole[y1:y2, x1:x2] = _picture(shape, x2 - x1)[..., 3] >= 128
        return encode(whole)


def make_toy_scenes(count: int, seed: int, side_px: int = SIDE_PX) -> tuple[ToyScene, ...]:
    """Generate scenes of 2 to `MAX_TOYS` toys; the same for the same arguments.

    Args:
        count: number of scenes.
        seed: random seed, not negative; other seeds give other scenes and other image ids.
        side_px: width and height of each scene.
    """
    # A little more than half of the scenes have few enough shapes.
    drawn = make_scenes(3 * count + 10, seed, side_px)
    small = [scene for scene in drawn if len(scene.shapes) <= MAX_TOYS][:count]
    return tuple(_with_toys(scene, seed, number) for number, scene in enumerate(small))


def render_toys(scene: ToyScene) -> RgbImage:
    """Draw a scene; returns (H, W, 3) uint8."""
    canvas = draw_ground(scene)
    for shape in scene.shapes:
        x1, y1, x2, y2 = scene.box_px(shape)
        toy = _picture(shape, x2 - x1).astype(np.float32)
        under = canvas[y1:y2, x1:x2]
        under += (toy[..., :3] - under) * (toy[..., 3:] / 255)
    return np.rint(canvas).astype(np.uint8)


def _picture(shape: SceneShape, side_px: int) -> np.ndarray:
    pattern, _ = shape.color.split()
    return draw_toy(shape.form, pattern, shape.rgb, side_px)


def _with_toys(scene: Scene, seed: int, number: int) -> ToyScene:
    """Return a scene with toys in the places of its shapes."""
    rng = np.random.default_rng([seed, number, 1])
    toys: list[SceneShape] = []
    for shape in scene.shapes:
        form, color = _look(rng, toys)
        rgb = PALETTE[color.split()[1]]
        toys.append(replace(shape, form=form, color=color, rgb=rgb))
    return ToyScene(
        image_id=f"toys-{seed}-{number:06d}",
        side_px=scene.side_px,
        shapes=tuple(toys),
        ground=scene.ground,
        texture=scene.texture,
        texture_seed=scene.texture_seed,
    )


def _look(rng: np.random.Generator, toys: Sequence[SceneShape]) -> tuple[str, str]:
    """Choose a name and a color; often, one of them is that of an earlier toy."""
    form = str(rng.choice(list(FORMS)))
    color = f"{rng.choice(list(PATTERNS))} {rng.choice(list(PALETTE))}"
    if toys and rng.random() < REPEAT:
        rival = toys[int(rng.integers(len(toys)))]
        return (rival.form, color) if rng.random() < 0.5 else (form, rival.color)
    return form, color
