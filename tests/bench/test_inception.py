"""Inception-v3 against TensorFlow's resizing formula, a recorded output and the published file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import published_shapes, random_state
from torch import Tensor

from dit_bench.quality.features import load_network
from dit_bench.quality.inception import (
    InceptionV3,
    find_weights,
    load_inception,
    preprocess,
    resize_tf1,
)

RECORDED = Path(__file__).parents[1] / "data" / "inception_random.json"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the counters that newer PyTorch stores in training."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    counters = {key.replace("running_var", "num_batches_tracked"): torch.tensor(0) for key in state
                if key.endswith("running_var")}  # fmt: skip
    torch.save(state | counters, path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> InceptionV3:
    return load_inception(weights)


def pattern(side: int) -> np.ndarray:
    """uint8 (1, side, side, 3): waves, the same everywhere."""
    y, x, c = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    return ((x * (3 + c) + y * y // 5 + 40 * c) % 256).astype(np.uint8)[None]


def resize_by_the_formula(image: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's ResizeBilinear on (H, W, C), pixel by pixel, in float32."""
    height, width, channels = image.shape
    made = np.empty((side, side, channels), np.float32)
    for i, j in np.ndindex(side, side):
        y = np.float32(i) * np.float32(height / side)
        x = np.float32(j) * np.float32(width / side)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above, below = (
            image[row, left] + (image[row, right] - image[row, left]) * (x - np.float32(left))
            for row in (top, bottom)
        )
        made[i, j] = above + (below - above) * (y - np.float32(top))
    return made


@pytest.mark.parametrize("size", [(5, 11), (40, 64)])
def test_resizing_is_tensorflows_formula(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.float32)
    expected = resize_by_the_formula(image, 32)
    found = resize_tf1(torch.from_numpy(image).permute(2, 0, 1)[None], 32)
    np.testing.assert_array_equal(found[0].permute(1, 2, 0).numpy(), expected)


def test_the_input_is_scaled_as_in_the_graph() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 299, 299, 3)
    x = preprocess(images)
    assert x.shape == (3, 3, 299, 299)
    assert [x[i].unique().tolist() for i in range(3)] == [[-1.0], [0.0], [127 / 128]]


def test_the_published_shapes_have_the_known_size() -> None:
    """Loading them, as the fixtures do, shows that these are the network's."""
    shapes = {key: shape for key, shape in published_shapes().items() if "running" not in key}
    # 21,785,568 is the known size without classifiers; the graph's has 1008 outputs.
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    assert numbers == 21_785_568 + 2048 * 1008 + 1008


def test_the_output_is_the_recorded_one(network: InceptionV3) -> None:
    """Recorded with these weights and this image from a port that agreed to 2e-5 with a plain
    composition of functions in float64, written from the paper's figures."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    with torch.inference_mode():
        found = network(preprocess(torch.from_numpy(pattern(64))))
    for name, values in zip(("pooled", "spatial", "logits"), found, strict=True):
        expected = np.array(recorded[name])
        values = values[0, :: recorded["strides"][name]].numpy()
        assert values.shape == expected.shape and expected.std() > 0.05  # alive
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_features_of_a_file_that_is_not_the_published_one(
    weights: Path, state: dict[str, Tensor]
) -> None:
    with pytest.warns(UserWarning, match="not comparable with published"):
        network = load_network("inception", weights)
    found = network.extract(np.concatenate([pattern(8), pattern(8)[:, ::-1]]))
    assert (network.metric, network.width, network.spatial_width) == ("FID", 2048, 2023)
    assert found.spatial is not None and found.spatial.shape == (2, 2023)
    logits = torch.from_numpy(found.pooled) @ state["fc.weight"].T  # ADM's: without the bias
    expected = logits.log_softmax(1).numpy()
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-3, atol=1e-3)


def test_other_weights_are_refused_in_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, kernel = tmp_path / "weights.pth", "Mixed_7a.branch3x3_1.conv.weight"
    for content, message in (
        (
            {k: v for k, v in state.items() if "Mixed_7c" not in k},
            "'Mixed_7c.branch1x1' is missing",
        ),
        ({k: v for k, v in state.items() if k != "fc.weight"}, "'fc.weight' is missing"),
        (state | {"aux": torch.zeros(1)}, "473 tensors"),
        (state | {"fc.weight": state["fc.weight"][:1000]}, r"fc.weight \(1000, 2048\)"),
        (state | {kernel: state[kernel][:, :64]}, "weight of size"),
        ([1, 2], "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_inception(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_absent_weights_say_which_file_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIT_INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        find_weights()
    for part in ("pt_inception-2015-12-05-6726825d.pth", "DIT_INCEPTION_WEIGHTS",
                 "https://github.com/mseitzer/pytorch-fid", "lite0"):  # fmt: skip
        assert part in str(caught.value)
    path = tmp_path / "here.pth"
    with pytest.raises(FileNotFoundError, match=r"here\.pth are not a file"):
        find_weights(path)
    path.touch()
    monkeypatch.setenv("DIT_INCEPTION_WEIGHTS", str(path))
    assert find_weights() == path
