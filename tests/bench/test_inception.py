"""Inception-v3 against TensorFlow's resizing formula, a plain functional composition of the network
in float64, a recorded vector, and the published file's keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inception_weights import published_shapes, random_state
from torch import Tensor

from dit_bench.quality.inception import (
    InceptionV3,
    find_weights,
    is_published,
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
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
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
    height, width, _ = image.shape
    made = np.empty((side, side, image.shape[2]), np.float32)
    down, across = np.float32(height / side), np.float32(width / side)
    for i in range(side):
        y = np.float32(i) * down
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(side):
            x = np.float32(j) * across
            left, right = int(x), min(int(x) + 1, width - 1)
            a, b = image[top, left], image[top, right]
            c, d = image[bottom, left], image[bottom, right]
            above = a + (b - a) * (x - np.float32(left))
            below = c + (d - c) * (x - np.float32(left))
            made[i, j] = above + (below - above) * (y - np.float32(top))
    return made


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (40, 64), (32, 32), (1, 3)])
def test_resizing_is_tensorflows_formula(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.float32)
    expected = resize_by_the_formula(image, 32)
    found = resize_tf1(torch.from_numpy(image).permute(2, 0, 1)[None], 32)
    np.testing.assert_array_equal(found[0].permute(1, 2, 0).numpy(), expected)


def test_resizing_has_no_half_pixel_centres() -> None:
    """Doubling 0, 1: samples at 0, ½, 1, 1½ (held at the edge), and not at -¼, ¼, ¾, 1¼."""
    row = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    assert resize_tf1(row, 4)[0, 0, 0].tolist() == [0, 0.5, 1, 1]
    halves = F.interpolate(row, (4, 4), mode="bilinear", align_corners=False)
    assert halves[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]


def test_the_input_is_scaled_as_in_the_graph() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 299, 299, 3)
    x = preprocess(images)
    assert x.shape == (3, 3, 299, 299)
    assert [x[i].unique().tolist() for i in range(3)] == [[-1.0], [0.0], [127 / 128]]


def test_every_key_and_shape_is_the_published_files() -> None:
    shapes = published_shapes()
    with torch.device("meta"):
        model = InceptionV3()
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if "num_batches" not in k}
    assert ours == shapes
    assert len(shapes) == 94 * 5 + 2
    # 21,785,568 is the known size without classifiers; the graph's has 1008 outputs.
    assert sum(p.numel() for p in model.parameters()) == 21_785_568 + 2048 * 1008 + 1008


class Plain:
    """The network as plain function calls on a state dict, in its dtype."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        s = {k: self.state[f"{name}.bn.{k}"].view(1, -1, 1, 1) for k in
             ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=pad)
        normal = (x - s["running_mean"]) / (s["running_var"] + 0.001).sqrt()
        return (normal * s["weight"] + s["bias"]).clamp(min=0)

    def averaged(self, x: Tensor) -> Tensor:
        """3×3 means over those of the nine that lie inside."""
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return sums / F.conv2d(ones, kernel, padding=1)

    def chain(self, x: Tensor, block: str, steps: str) -> Tensor:
        """Steps are "name:padding", two digits, or "name/2" for a stride of 2 without padding."""
        for step in steps.split():
            name, _, pad = step.partition(":")
            name, _, stride = name.partition("/")
            padding = (int(pad[0]), int(pad[1])) if pad else (0, 0)
            x = self.conv(x, f"{block}.branch{name}", int(stride or 1), padding)
        return x

    def block(self, x: Tensor, n: str, *branches: str, pool: Tensor | None = None) -> Tensor:
        last = F.max_pool2d(x, 3, 2) if pool is None else self.conv(pool, f"{n}.branch_pool")
        return torch.cat([*(self.chain(x, n, steps) for steps in branches), last], 1)

    def a(self, x: Tensor, n: str) -> Tensor:
        return self.block(x, n, "1x1", "5x5_1 5x5_2:22", "3x3dbl_1 3x3dbl_2:11 3x3dbl_3:11",
                          pool=self.averaged(x))  # fmt: skip

    def c(self, x: Tensor, n: str) -> Tensor:
        double = "7x7dbl_1 7x7dbl_2:30 7x7dbl_3:03 7x7dbl_4:30 7x7dbl_5:03"
        return self.block(x, n, "1x1", "7x7_1 7x7_2:03 7x7_3:30", double, pool=self.averaged(x))

    def e(self, x: Tensor, n: str, pool: Tensor) -> Tensor:
        return self.block(x, n, "1x1", "3x3_1 3x3_2a:01", "3x3_1 3x3_2b:10",
                          "3x3dbl_1 3x3dbl_2:11 3x3dbl_3a:01", "3x3dbl_1 3x3dbl_2:11 3x3dbl_3b:10",
                          pool=pool)  # fmt: skip

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", pad=(1, 1)), 3, 2)
        x = F.max_pool2d(self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
        for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(x, n)
        x = self.block(x, "Mixed_6a", "3x3/2", "3x3dbl_1 3x3dbl_2:11 3x3dbl_3/2")
        for n in ("Mixed_6b", "Mixed_6c"):
            x = self.c(x, n)
        # mixed_6/conv of the graph is this branch; ADM takes its first 7 channels, channels last.
        spatial = self.conv(x, "Mixed_6d.branch1x1")[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.c(self.c(x, "Mixed_6d"), "Mixed_6e")
        seven = "7x7x3_1 7x7x3_2:03 7x7x3_3:30 7x7x3_4/2"
        x = self.block(x, "Mixed_7a", "3x3_1 3x3_2/2", seven)
        x = self.e(x, "Mixed_7b", self.averaged(x))
        x = self.e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, padding=1))
        pooled = x.mean((2, 3))
        return pooled, spatial, pooled @ self.state["fc.weight"].T


def test_the_network_is_the_plain_composition(
    state: dict[str, Tensor], network: InceptionV3
) -> None:
    x = preprocess(torch.from_numpy(pattern(64)))
    with torch.inference_mode():
        expected = Plain({k: v.double() for k, v in state.items()})(x.double())
        found = network(x)
    for ours, exact in zip(found, expected, strict=True):
        assert exact.std() > 0.05  # alive
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 2e-5


def test_the_output_is_the_recorded_one(network: InceptionV3) -> None:
    """Made once with these weights and this image; it holds the port in its place."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    with torch.inference_mode():
        found = network(preprocess(torch.from_numpy(pattern(64))))
    for name, values in zip(("pooled", "spatial", "logits"), found, strict=True):
        expected = np.array(recorded[name])
        stride = recorded["strides"][name]
        np.testing.assert_allclose(values[0, ::stride].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_counters_of_training_may_be_in_the_file(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    other = tmp_path / "counted.pth"
    counters = {k.replace("running_var", "num_batches_tracked"): torch.tensor(0) for k in state
                if k.endswith("running_var")}  # fmt: skip
    torch.save(state | counters, other)
    x = preprocess(torch.from_numpy(pattern(8)))
    with torch.inference_mode():
        assert torch.equal(load_inception(other)(x)[0], load_inception(weights)(x)[0])


def test_other_weights_are_refused_in_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refused(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_inception(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    few = {k: v for k, v in state.items() if not k.startswith("Mixed_7c")}
    refused(few, "45 keys missing: 'Mixed_7c.branch1x1.conv.weight'")
    small = {k: v for k, v in state.items() if k.startswith("fc")} | {"aux": torch.zeros(1)}
    refused(small, r"470 keys missing.*1 keys too many: 'aux'")
    thin = {k: v[..., :1] for k, v in state.items() if k.startswith("fc.weight")}
    refused(thin, r"fc.weight is \(1008, 1\) instead of \(1008, 2048\)")
    refused([1, 2], "holds no state dict")
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="damaged or not a PyTorch file"):
        load_inception(path)


def test_absent_weights_say_which_file_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIT_INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth") as caught:
        find_weights()
    for part in ("DIT_INCEPTION_WEIGHTS", "https://github.com/mseitzer/pytorch-fid", "lite0"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth are not a file"):
        find_weights(tmp_path / "absent.pth")
    path = tmp_path / "here.pth"
    path.touch()
    monkeypatch.setenv("DIT_INCEPTION_WEIGHTS", str(path))
    assert find_weights() == path
    assert is_published("6726825d" + "0" * 56) and not is_published("0" * 64)
