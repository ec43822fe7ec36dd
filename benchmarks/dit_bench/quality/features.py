"""The networks whose features are compared.

"inception" gives FID, sFID and Inception Score. "lite0" is EfficientNet-Lite0, which needs no
downloaded file, and gives FD-Lite0; its numbers are not comparable with FID and never called FID.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dit_bench.quality import inception, lite0
from dit_bench.quality.image_sets import ComparedSet, Images
from dit_bench.quality.metrics import ROWS, Features, Statistics, moments_of
from dit_engine.console.bars import Bar
from dit_engine.io.files import file_hash

_CHUNK = 64  # images between two updates of a progress bar


class Extracted(NamedTuple):
    """Features of n images, float32: pooled (n, D); Inception also gives spatial (n, S) and
    log_probabilities (n, K)."""

    pooled: Features
    spatial: Features | None = None
    log_probabilities: Features | None = None


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

    def pooled(self, images: Images, description: str) -> Features:
        """Pooled features (N, D) of many images, with a progress bar that shows ``description``."""
        starts = Bar(range(0, len(images), _CHUNK), description, delay=0.5)
        return np.concatenate([self.extract(images[i : i + _CHUNK]).pooled for i in starts])

    def read(
        self,
        of: ComparedSet,
        batch_size: int = 32,
        quiet: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> Extracted:
        """Features of all images of a set, mapped from temporary files (for Inception, 20 KB per
        image), so that memory does not grow with N.

        quiet: no progress bar. check: called after every batch; it may raise KeyboardInterrupt.
        """
        name, files, found = Path(of.name).name or of.name, {}, {}
        with (
            ExitStack() as stack,
            Bar(total=of.count, desc=name, unit="img", delay=2.0, disable=quiet) as bar,
        ):
            for batch in of.batches(batch_size):
                for key, rows in self.extract(batch)._asdict().items():
                    if rows is not None:
                        if key not in files:
                            file = stack.enter_context(tempfile.TemporaryFile())
                            files[key] = file, (of.count, rows.shape[1])
                        files[key][0].write(np.asarray(rows, np.float32).tobytes())
                bar.update(len(batch))
                check()
            for key, (file, shape) in files.items():
                file.flush()
                found[key] = np.memmap(file, np.float32, "r", shape=shape)
        return Extracted(**found)

    def accept(self, of: ComparedSet, allow_few: bool) -> ComparedSet:
        """``of`` in the form that this network can compare: without statistics of other features.

        Raises ValueError if nothing is left, if its statistics have another width, or if it has no
        more images than there are features and not ``allow_few``.
        """
        if of.statistics is not None and self.spatial_width:
            widths, needed = [s.width for s in of.statistics], [self.width, self.spatial_width]
            if widths != needed:
                raise ValueError(f"{of.name} holds statistics of {widths} features; {needed} are "
                                 "needed")  # fmt: skip
            return of
        if not of.count:
            raise ValueError(f"{of.name} holds statistics of Inception's features; features "
                             f"{self.name!r} need images")  # fmt: skip
        need = max(self.width, self.spatial_width) + 1
        if of.count < need and not allow_few:
            raise ValueError(f"{of.name} has {of.count} images, too few for {self.width} features; "
                             f"at least {need} are needed (or --allow-few)")  # fmt: skip
        return replace(of, statistics=None)


def moments(of: ComparedSet, found: Extracted | None, which: int = 0) -> Statistics:
    """The moments of the pooled (0) or the spatial (1) features: those in the file if it has them,
    because they are of all images, while the file may hold only some of these."""
    if of.statistics is not None:
        return of.statistics[which]
    rows = found and found[which]
    assert rows is not None
    return moments_of(rows, ROWS)


def load_network(
    name: str, weights: Path | None = None, device: torch.device | None = None
) -> FeatureNetwork:
    """The network called ``name``, one of `NETWORKS`, on ``device`` (None: the CPU).

    weights: Inception's file; None means the one that DIT_INCEPTION_WEIGHTS names.

    Raises ValueError for a file that holds other weights or is given with lite0,
    FileNotFoundError without Inception's weights, ImportError without Lite0's package.
    """
    make = {"lite0": _lite0, "inception": _inception}[name]
    return make(weights, device or torch.device("cpu"))


def _lite0(weights: Path | None, device: torch.device) -> FeatureNetwork:
    if weights is not None:
        raise ValueError(f"--inception-weights {weights}: --features lite0 reads none")
    model = lite0.load_lite0(device=device)

    def extract(images: Images) -> Extracted:
        # A few images at a time stay in a CPU's cache.
        parts = torch.from_numpy(np.array(images)).split(4 if device.type == "cpu" else 64)
        with torch.inference_mode(), full_precision():
            found = [model(lite0.preprocess(part.to(device))).cpu() for part in parts]
        return Extracted(torch.cat(found).numpy())

    record = {"features": "lite0", "weights_sha256": lite0.WEIGHTS_SHA256}
    return FeatureNetwork("lite0", "FD-Lite0", lite0.FEATURES, extract, record=record)


def _inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    path = inception.find_weights(weights)
    model = inception.load_inception(path, device)
    digest = file_hash(path)
    if not digest.startswith(inception.DIGEST):
        warnings.warn(
            f"{path} is not {inception.WEIGHTS_FILE} (its SHA-256 is {digest[:8]}…): "
            "distances are not comparable with published ones",
            stacklevel=3,
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
    # If an argument were left out, torch's default would replace the current setting.
    same = ("enabled", "benchmark", "benchmark_limit", "deterministic")
    return cudnn.flags(**{name: getattr(cudnn, name) for name in same}, allow_tf32=False)
