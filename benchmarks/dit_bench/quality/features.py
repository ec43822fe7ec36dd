"""The networks by whose features image sets are compared, and what is gathered of a set.

"inception" gives FID, sFID and Inception Score; "lite0" is EfficientNet-Lite0, which needs no
downloaded file, and gives FD-Lite0: another network, other numbers, never called FID.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_bench.quality import inception, lite0
from dit_bench.quality.frechet import Moments
from dit_bench.quality.metrics import InceptionScore
from dit_bench.quality.set_arguments import NETWORKS

Images = NDArray[np.uint8]
Array = NDArray[np.float32]

_ROWS = 512  # of features between two updates of the moments, which cost D² each


@dataclass(frozen=True)
class Extracted:
    """Of n images: pooled (n, D); of Inception also spatial (n, S), log_probabilities (n, K)."""

    pooled: Array
    spatial: Array | None = None
    log_probabilities: Array | None = None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network from uint8 images (n, H, W, 3) to features.

    metric: the name of the Fréchet distance of its pooled features.
    width, spatial_width: D and S; S is 0 where there are no spatial features.
    record: what tells it apart, for reports.
    """

    name: str
    metric: str
    width: int
    extract: Callable[[Images], Extracted]
    spatial_width: int = 0
    record: dict[str, str] = field(default_factory=dict)


def load_network(
    name: str, weights: Path | None = None, device: torch.device | None = None
) -> FeatureNetwork:
    """The network called ``name``, on ``device`` (None: the CPU).

    Args:
        weights: Inception's file; None is what DIT_INCEPTION_WEIGHTS names.

    Raises:
        ValueError: an unknown name, a file that holds other weights, or one for Lite0.
        FileNotFoundError: no Inception weights. ImportError: Lite0's package is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"features {name!r}: choose one of {', '.join(NETWORKS)}")
    device = device or torch.device("cpu")
    if name == "lite0":
        if weights is not None:
            raise ValueError(f"--inception-weights {weights}: --features {name} reads none")
        return _lite0(device)
    return _inception(inception.find_weights(weights), device)


def _lite0(device: torch.device) -> FeatureNetwork:
    model = lite0.load_lite0().to(device)

    def extract(images: Images) -> Extracted:
        # Few images at a time stay in a CPU's cache.
        parts = torch.from_numpy(np.array(images)).split(4 if device.type == "cpu" else 64)
        with torch.inference_mode(), full_precision():
            found = [model(lite0.preprocess(part.to(device))).cpu() for part in parts]
        return Extracted(torch.cat(found).numpy())

    record = {"features": "lite0", "weights_sha256": lite0.WEIGHTS_SHA256}
    return FeatureNetwork("lite0", "FD-Lite0", lite0.FEATURES, extract, record=record)


def _inception(path: Path, device: torch.device) -> FeatureNetwork:
    model = inception.load_inception(path).to(device)
    digest = inception.weights_digest(path)
    if not inception.is_published(digest):
        warnings.warn(
            f"{path} is not {inception.WEIGHTS_FILE} (its SHA-256 is {digest[:8]}…): "
            "distances are not comparable with published ones",
            stacklevel=2,
        )

    def extract(images: Images) -> Extracted:
        batch = torch.from_numpy(np.array(images)).to(device)
        with torch.inference_mode(), full_precision():
            pooled, spatial, logits = model(inception.preprocess(batch))
            logarithms = logits.log_softmax(dim=1)
        return Extracted(*(t.cpu().numpy() for t in (pooled, spatial, logarithms)))

    return FeatureNetwork(
        "inception",
        "FID",
        inception.FEATURES,
        extract,
        inception.SPATIAL_FEATURES,
        {"features": "inception", "weights_sha256": digest},
    )


def full_precision() -> AbstractContextManager[None]:
    """Convolutions of float32 in float32: torch lets CUDA round their inputs to TF32's 10 bits."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(  # what is not given would be torch's default, not what is set
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


class SetFeatures:
    """Everything that is gathered of one set, image by image, in memory that N never enters.

    pooled, spatial: moments (spatial is None without such features); score: None likewise.
    Pooled features are also kept, on disk, for precision and recall.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network, self.count = network, 0
        self.pooled = Moments(network.width)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        self.score = InceptionScore() if network.spatial_width else None
        self._kept = tempfile.TemporaryFile(prefix="dit-bench-features-")  # noqa: SIM115
        self._waiting: list[Extracted] = []

    def add(self, images: Images) -> None:
        """Add images (n, H, W, 3), all of them or, when interrupted, none."""
        found = self.network.extract(images)
        with deferred_interrupt():
            self._waiting.append(found)
            self.count += len(found.pooled)
            if sum(len(e.pooled) for e in self._waiting) >= _ROWS:
                self.flush()

    def flush(self) -> None:
        """Enter what waits into the moments."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        pooled = np.concatenate([e.pooled for e in waiting])
        self.pooled.update(pooled)
        self._kept.seek(0, 2)
        self._kept.write(np.ascontiguousarray(pooled, np.float32).tobytes())
        if self.spatial is not None and self.score is not None:
            self.spatial.update(np.concatenate([_present(e.spatial) for e in waiting]))
            self.score.update(np.concatenate([_present(e.log_probabilities) for e in waiting]))

    def vectors(self) -> Array:
        """Pooled features (N, D), mapped from disk, read-only."""
        self.flush()
        self._kept.flush()
        return np.memmap(self._kept, np.float32, "r", shape=(self.count, self.network.width))

    def close(self) -> None:
        """Give the disk's space back; nothing may be read afterwards."""
        self._kept.close()

    def __enter__(self) -> SetFeatures:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _present(array: Array | None) -> Array:
    assert array is not None
    return array


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Ctrl-C within the block is raised after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where it is never raised
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
