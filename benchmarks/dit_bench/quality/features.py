"""The networks whose features are compared, and what is gathered from the images of one set.

"inception" gives FID, sFID and Inception Score. "lite0" is EfficientNet-Lite0, which needs no
downloaded file, and gives FD-Lite0; its numbers are not comparable with FID and never called FID.
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

from dit_bench.quality import NETWORKS, inception, lite0
from dit_bench.quality.frechet import Gaussian, Moments
from dit_bench.quality.image_sets import ComparedSet
from dit_bench.quality.metrics import InceptionScore
from dit_engine.io.files import file_hash

Images = NDArray[np.uint8]
Array = NDArray[np.float32]

_ROWS = 512  # feature rows between two updates of the moments, which cost D² each
_CHUNK = 64  # images between two updates of a progress bar


@dataclass(frozen=True)
class Extracted:
    """Features of n images: pooled (n, D); Inception also gives spatial (n, S) and
    log_probabilities (n, K)."""

    pooled: Array
    spatial: Array | None = None
    log_probabilities: Array | None = None


@dataclass(frozen=True)
class FeatureNetwork:
    """A network from uint8 images (n, H, W, 3) to features.

    metric: the name of the Fréchet distance of its pooled features.
    width, spatial_width: D and S; S is 0 if there are no spatial features.
    record: identifies the network in reports.
    """

    name: str
    metric: str
    width: int
    extract: Callable[[Images], Extracted]
    spatial_width: int = 0
    record: dict[str, str] = field(default_factory=dict)

    def pooled(self, images: Images, description: str) -> Array:
        """Pooled features (N, D) of many images, under a progress bar of that description."""
        from dit_engine.console.bars import Bar

        found = [np.empty((0, self.width), np.float32)]
        with Bar(total=len(images), desc=description, unit="img", delay=0.5) as bar:
            for start in range(0, len(images), _CHUNK):
                found.append(self.extract(images[start : start + _CHUNK]).pooled)
                bar.update(len(found[-1]))
        return np.concatenate(found)

    def accept(self, of: ComparedSet, allow_few: bool) -> ComparedSet:
        """``of`` as this network can compare it: without the statistics of other features.

        Raises ValueError if nothing is left, if its statistics have another width, or if it has no
        more images than there are features and not ``allow_few``.
        """
        if of.statistics is not None and self.spatial_width:
            widths = tuple(s.width for s in of.statistics)
            if widths != (self.width, self.spatial_width):
                raise ValueError(
                    f"{of.name} holds statistics of {widths[0]} and {widths[1]} features; "
                    f"{self.width} and {self.spatial_width} are needed"
                )
            return of
        if of.images is None:
            raise ValueError(
                f"{of.name} holds statistics of Inception's features; "
                f"features {self.name!r} need images"
            )
        need = max(self.width, self.spatial_width) + 1
        if len(of.images) < need and not allow_few:
            raise ValueError(
                f"{of.name} has {len(of.images)} images, too few for {self.width} features; "
                f"at least {need} are needed (or --allow-few)"
            )
        return ComparedSet(of.name, of.images)


def load_network(
    name: str, weights: Path | None = None, device: torch.device | None = None
) -> FeatureNetwork:
    """The network called ``name``, on ``device`` (None: the CPU).

    Args:
        weights: Inception's file; None means the one that DIT_INCEPTION_WEIGHTS names.

    Raises:
        ValueError: an unknown name, a file that holds other weights, or a file for Lite0.
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
        # A few images at a time stay in a CPU's cache.
        parts = torch.from_numpy(np.array(images)).split(4 if device.type == "cpu" else 64)
        with torch.inference_mode(), full_precision():
            found = [model(lite0.preprocess(part.to(device))).cpu() for part in parts]
        return Extracted(torch.cat(found).numpy())

    record = {"features": "lite0", "weights_sha256": lite0.WEIGHTS_SHA256}
    return FeatureNetwork("lite0", "FD-Lite0", lite0.FEATURES, extract, record=record)


def _inception(path: Path, device: torch.device) -> FeatureNetwork:
    model = inception.load_inception(path).to(device)
    digest = file_hash(path)
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

    record = {"features": "inception", "weights_sha256": digest}
    return FeatureNetwork(
        "inception", "FID", inception.FEATURES, extract, inception.SPATIAL_FEATURES, record
    )


def full_precision() -> AbstractContextManager[None]:
    """Float32 convolutions in float32: torch lets CUDA round their inputs to TF32's 10 bits."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(  # an argument that is left out would be torch's default, not what is set
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


class SetFeatures:
    """Everything that is gathered from one set, image by image; N does not affect the memory.

    pooled, spatial: moments; score: the Inception Score. spatial and score are None if the network
    does not give them. Pooled features are also kept, on disk, for precision and recall.
    """

    def __init__(self, network: FeatureNetwork, of: ComparedSet) -> None:
        self.network, self.of, self.count = network, of, 0
        self.pooled = Moments(network.width)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        self.score = InceptionScore() if network.spatial_width else None
        self._kept = tempfile.TemporaryFile(prefix="dit-bench-features-")  # noqa: SIM115
        self._waiting: list[Extracted] = []

    @property
    def moments(self) -> tuple[Gaussian, Gaussian | None]:
        """What distances are taken of: the statistics in the set's file, or else `pooled` and
        `spatial`."""
        return self.of.statistics or (self.pooled, self.spatial)

    def read(
        self, batch_size: int = 32, quiet: bool = False, check: Callable[[], object] = lambda: None
    ) -> bool:
        """Add all images of the set. Returns False if Ctrl-C stopped it before the last one.

        quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.
        """
        from dit_engine.console.bars import Bar

        if (images := self.of.images) is None:
            return True
        name = Path(images.name).name or images.name
        with Bar(total=len(images), desc=name, unit="img", delay=2.0, disable=quiet) as bar:
            try:
                for batch in images.batches(batch_size):
                    self.add(batch)
                    bar.update(len(batch))
                    check()
            except KeyboardInterrupt:
                return False
            finally:
                self.flush()
        return True

    def add(self, images: Images) -> None:
        """Add images (n, H, W, 3). If this is interrupted, either all of them or none are added."""
        found = self.network.extract(images)
        with deferred_interrupt():
            self._waiting.append(found)
            self.count += len(found.pooled)
            if sum(len(e.pooled) for e in self._waiting) >= _ROWS:
                self.flush()

    def flush(self) -> None:
        """Enter the waiting features into the moments."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        pooled = np.concatenate([e.pooled for e in waiting])
        self.pooled.update(pooled)
        self._kept.seek(0, 2)
        self._kept.write(np.ascontiguousarray(pooled, np.float32).tobytes())
        if self.spatial is not None and self.score is not None:
            self.spatial.update(
                np.concatenate([e.spatial for e in waiting if e.spatial is not None])
            )
            logarithms = [e.log_probabilities for e in waiting if e.log_probabilities is not None]
            self.score.update(np.concatenate(logarithms))

    def vectors(self) -> Array:
        """Pooled features (N, D), mapped from disk, read-only."""
        self.flush()
        self._kept.flush()
        return np.memmap(self._kept, np.float32, "r", shape=(self.count, self.network.width))

    def __enter__(self) -> SetFeatures:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()  # which frees the disk space; nothing may be read afterwards


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Ctrl-C within the block is raised after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # KeyboardInterrupt is raised in the main thread only
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
