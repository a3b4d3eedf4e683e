"""The detector keeps batch, precision and checkpoint; candidates match a slow reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reir.models.yolox import (
    NMS_POOL,
    Focus,
    YoloxNano,
    YoloxOutput,
    decode_boxes,
    greedy_nms,
    letterbox,
    select_candidates,
)

SIDE = 96


@pytest.fixture(scope="module")
def detector() -> YoloxNano:
    torch.manual_seed(0)
    return YoloxNano().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 255


def random_output(num_images: int, num_anchors: int, seed: int, *, levels: int = 0) -> YoloxOutput:
    """Overlapping boxes, some outside the image; `levels` > 0 makes scores tie."""
    rng = torch.Generator().manual_seed(seed)
    center = torch.rand(num_images, num_anchors, 2, generator=rng) * 120 - 10
    half = torch.rand(num_images, num_anchors, 2, generator=rng) * 30 - 1
    objectness = torch.rand(num_images, num_anchors, generator=rng)
    classes = torch.rand(num_images, num_anchors, 80, generator=rng)
    if levels:
        objectness = (objectness * levels).floor() / levels
        classes = torch.ones_like(classes) / 2
    return YoloxOutput(
        boxes_xyxy_px=torch.cat((center - half, center + half), dim=2),
        objectness=objectness,
        class_scores=classes,
        class_features=torch.rand(num_images, num_anchors, 64, generator=rng),
    )


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (area - overlap)


def slow_anchors(
    output: YoloxOutput, image: int, scale: float, size_px: tuple[int, int], keep: int
) -> list[int]:
    """Clip, drop slivers, sort all, then compare every box with every kept one."""
    limit = [size_px[1] * scale, size_px[0] * scale] * 2
    rows = []
    for anchor, box in enumerate(output.boxes_xyxy_px[image].tolist()):
        clipped = [min(max(v, 0.0), top) for v, top in zip(box, limit, strict=True)]
        score = float(output.objectness[image, anchor] * output.class_scores[image, anchor].max())
        sides = (clipped[2] - clipped[0], clipped[3] - clipped[1])
        if min(sides) >= 1.0 and score > 0:
            rows.append((-score, anchor, clipped))
    kept: list[tuple[int, list[float]]] = []
    for _, anchor, box in sorted(rows):
        if len(kept) < keep and all(slow_iou(box, other) <= 0.7 for _, other in kept):
            kept.append((anchor, box))
    return [anchor for anchor, _ in kept]


@pytest.mark.parametrize("keep", [1, 7, 400], ids=["one", "few", "more-than-there-are"])
@pytest.mark.parametrize("levels", [0, 5], ids=["distinct", "ties"])
@pytest.mark.parametrize("anchors", [1, 40, 300])
def test_select_candidates_equals_the_slow_reference(anchors: int, levels: int, keep: int) -> None:
    output = random_output(2, anchors, seed=anchors + levels, levels=levels)
    scales, sizes_px = [0.5, 2.0], [(150, 200), (40, 50)]
    found = select_candidates(output, scales, sizes_px, keep)
    for i, candidates in enumerate(found):
        expected = slow_anchors(output, i, scales[i], sizes_px[i], keep)
        assert candidates.anchors.tolist() == expected


def test_candidates_have_the_box_scores_and_features_of_their_anchor() -> None:
    output = random_output(2, 200, seed=3)
    height, width, scale = 150, 200, 0.5
    candidates = select_candidates(output, [scale] * 2, [(height, width)] * 2, 20)[1]
    anchors = candidates.anchors
    clipped = output.boxes_xyxy_px[1, anchors].clamp(min=0)
    clipped = torch.minimum(clipped, torch.tensor([100.0, 75.0, 100.0, 75.0]))
    torch.testing.assert_close(
        candidates.boxes, clipped / scale / torch.tensor([width, height, width, height])
    )
    assert candidates.boxes.min() >= 0
    assert candidates.boxes.max() <= 1
    assert (candidates.scores.diff() <= 0).all()
    torch.testing.assert_close(candidates.scores, output.scores[1, anchors])
    torch.testing.assert_close(candidates.class_scores, output.class_scores[1, anchors])
    torch.testing.assert_close(candidates.class_features, output.class_features[1, anchors])


def test_an_image_without_candidates_gives_empty_tensors_beside_a_full_one() -> None:
    output = random_output(3, 50, seed=4)
    output.objectness[1] = 0
    output.boxes_xyxy_px[2] = torch.tensor([-50.0, -50.0, -10.0, -10.0])
    full, no_score, outside = select_candidates(output, [1.0] * 3, [(100, 100)] * 3, 10)
    assert len(full) == 10
    for empty in (no_score, outside):
        assert len(empty) == 0
        assert empty.boxes.shape == (0, 4)
        assert empty.class_scores.shape == (0, 80)
        assert empty.class_features.shape == (0, 64)


def test_candidates_with_nan_are_never_chosen() -> None:
    output = random_output(1, 30, seed=5)
    output.boxes_xyxy_px[0, :10] = float("nan")
    output.objectness[0, 10:20] = float("nan")
    candidates = select_candidates(output, [1.0], [(100, 100)], 30)[0]
    assert len(candidates) > 0
    assert candidates.anchors.min() >= 20
    assert candidates.boxes.isfinite().all()


def test_only_the_best_scores_enter_suppression() -> None:
    output = random_output(1, NMS_POOL + 500, seed=6)
    output.boxes_xyxy_px[:] = torch.tensor([1.0, 1.0, 9.0, 9.0])
    ranks = output.scores[0].argsort(descending=True)
    everything = select_candidates(output, [1.0], [(200, 200)], NMS_POOL + 500, nms_iou=1.0)[0]
    assert everything.anchors.tolist() == ranks[:NMS_POOL].tolist()


def test_suppression_keeps_touching_boxes_and_drops_equal_ones() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 2, 1]]])
    scores = torch.tensor([[0.9, 0.9, 0.8, 0.7]])
    picks, counts = greedy_nms(boxes, scores, 4, max_iou=0.5)
    assert counts.tolist() == [3]
    assert picks[0, :3].tolist() == [0, 2, 3]  # an overlap of exactly max_iou stays


@pytest.mark.parametrize(
    ("scales", "keep", "message"),
    [([1.0], 5, "2 images need as many"), ([1.0, 1.0], 0, "at least 1, got 0")],
    ids=["lengths", "none-wanted"],
)
def test_select_candidates_refuses_invalid_arguments(
    scales: list[float], keep: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_candidates(random_output(2, 5, seed=0), scales, [(9, 9)] * len(scales), keep)


def test_decoding_matches_a_loop_over_cells() -> None:
    deltas = torch.randn(1, 16 * 8 + 8 * 4 + 4 * 2, 4, generator=torch.Generator().manual_seed(0))
    expected = []
    rows = iter(deltas[0].tolist())
    for height, width, stride in ((8, 16, 8), (4, 8, 16), (2, 4, 32)):
        for y in range(height):
            for x in range(width):
                dx, dy, log_w, log_h = next(rows)
                cx, cy = (x + dx) * stride, (y + dy) * stride
                w, h = np.exp(log_w) * stride, np.exp(log_h) * stride
                expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    found = decode_boxes(deltas, [(8, 16), (4, 8), (2, 4)])
    torch.testing.assert_close(found[0].double(), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_detector_outputs_have_the_expected_shapes_and_ranges(
    detector: YoloxNano, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        output = detector(images)
    anchors = 12 * 12 + 6 * 6 + 3 * 3
    assert output.boxes_xyxy_px.shape == (3, anchors, 4)
    assert output.objectness.shape == (3, anchors)
    assert output.class_scores.shape == (3, anchors, 80)
    assert output.class_features.shape == (3, anchors, 64)
    assert 0 <= output.scores.min() <= output.scores.max() <= 1


def test_the_stem_equals_slicing_into_patches_and_a_convolution() -> None:
    torch.manual_seed(0)
    stem, images = Focus(16), torch.randn(2, 3, 12, 20)
    top, bottom = images[..., ::2, :], images[..., 1::2, :]
    patches = (top[..., ::2], bottom[..., ::2], top[..., 1::2], bottom[..., 1::2])
    with torch.inference_mode():
        expected = stem.conv(torch.cat(patches, dim=1))
        torch.testing.assert_close(stem(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 96, 96), (1, 1, 96, 96), (1, 3, 100, 96)])
def test_images_of_wrong_shape_are_refused(detector: YoloxNano, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        detector(torch.zeros(shape))


def test_an_image_gives_the_same_output_alone_and_in_a_batch(
    detector: YoloxNano, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        together = detector(images)
        for i in range(len(images)):
            alone = detector(images[i : i + 1])
            for name in ("boxes_xyxy_px", "objectness", "class_scores", "class_features"):
                torch.testing.assert_close(
                    getattr(alone, name)[0], getattr(together, name)[i], rtol=1e-5, atol=1e-5
                )


def test_the_memory_layout_does_not_change_the_output(
    detector: YoloxNano, images: torch.Tensor
) -> None:
    last = YoloxNano().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last.load_state_dict(detector.state_dict())
    with torch.inference_mode():
        expected = detector(images)
        found = last(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found.boxes_xyxy_px, expected.boxes_xyxy_px, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.class_features, expected.class_features, rtol=0, atol=1e-5)


def test_half_precision_returns_float32_close_to_full(
    detector: YoloxNano, images: torch.Tensor
) -> None:
    with torch.inference_mode():
        expected = detector(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = detector(images)
    assert found.boxes_xyxy_px.dtype == found.class_scores.dtype == torch.float32
    torch.testing.assert_close(found.class_scores, expected.class_scores, rtol=0, atol=0.02)
    torch.testing.assert_close(found.boxes_xyxy_px, expected.boxes_xyxy_px, rtol=0.02, atol=1.0)


def test_gradients_reach_every_parameter(images: torch.Tensor) -> None:
    detector = YoloxNano().train()
    output = detector(images)
    (output.boxes_xyxy_px.mean() + output.scores.sum() + output.class_scores.sum()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_a_saved_detector_is_loaded_bit_for_bit(
    detector: YoloxNano, images: torch.Tensor, tmp_path: Path
) -> None:
    save_file(detector.state_dict(), tmp_path / "detector.safetensors")
    loaded = YoloxNano().eval()
    loaded.load_state_dict(load_file(tmp_path / "detector.safetensors"))
    with torch.inference_mode():
        assert torch.equal(loaded(images).boxes_xyxy_px, detector(images).boxes_xyxy_px)


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (400, 300), (64, 64), (20, 31), (1, 2000), (2000, 1)]
)
def test_letterbox_puts_the_image_top_left_on_grey(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tensor, scale = letterbox(image, 64)
    wide, high = max(int(width * scale), 1), max(int(height * scale), 1)
    pillow = Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR)
    resized = np.asarray(pillow).astype(np.float32)
    assert tensor.shape == (3, 64, 64)
    assert tensor.dtype == torch.float32
    assert scale == pytest.approx(64 / max(height, width))
    for bgr, rgb in ((0, 2), (1, 1), (2, 0)):
        assert np.abs(tensor[bgr, :high, :wide].numpy() - resized[:, :, rgb]).max() <= 1
    assert (tensor[:, high:] == 114).all()
    assert (tensor[:, :, wide:] == 114).all()


@pytest.mark.parametrize(
    "image",
    [np.zeros((5, 5), np.uint8), np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 3), np.int32)],
    ids=["grey", "empty", "wide-integers"],
)
def test_letterbox_refuses_images_of_wrong_shape_or_type(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, not empty, got"):
        letterbox(image, 64)
