"""The fast decoder of a VAE: it computes what `AutoencoderKL.decode` computes, in packed layers.

On a GPU, a shape that is decoded repeatedly runs as a CUDA graph.

Shape letters: N images, H and W pixels, c latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.backends.capture import GRAPH_LIMIT, CapturedGraph, GraphCache, Turns
from dit_engine.backends.lean.vae_layers import Conv, Layer, Norm, Pointwise, layer_of, leaves_sums
from dit_engine.vae import AutoencoderKL, Decoder, Level

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 8
"""Channels of the first and last layers on a GPU are padded to a multiple of this."""
LARGEST_BATCH = 8
LARGEST_BATCH_LATENTS = 8 * 64 * 64
"""A GPU decodes at most so much at a time: 8 images of up to 512 × 512 pixels, fewer if they are
larger. Larger batches are not expected to be faster; this is not measured."""


class LeanDecoder:
    """The decoder of ``vae`` with its own copy of the weights, in ``dtype`` on ``device``.

    It keeps no reference to ``vae`` and does not change it. The weights take the memory of the
    decoder's parameters in ``dtype``, except that those of the upsampling convolutions take 16/9 of
    it, which is 8 % more for the whole decoder of Stable Diffusion. Threads may share one decoder.

    Raises ValueError for a dtype other than float32, bfloat16 and float16 (in which Stable
    Diffusion's decoder overflows).
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, device: torch.device | str) -> None:
        if dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"dtype {dtype}: choose one of {allowed}")
        self.config, self.dtype, self.device = vae.config, dtype, torch.device(device)
        with torch.no_grad():
            self._network = Network(vae, dtype, self.device)
        self._graphs = None
        if self.device.type == "cuda":
            self._graphs = DecoderGraphs(self._network)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """The network's latents z (N, c, h, w) → float32 images (N, 3, H, W) on the device.

        In float32 on the CPU the images are decoded one by one, so that the bits of an image do not
        depend on the batch. A GPU decodes them in batches of 8, 4, 2 and 1, so that there are few
        shapes to capture. Raises ValueError for latents of another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels or 0 in z.shape[2:]:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; (N, {self.config.latent_channels}, h, w) is needed"
            )
        images = self._network.empty_images(z.shape)
        sizes = self._batches(len(z), z.shape[2] * z.shape[3])
        for part, pixels in zip(z.split(sizes), images.split(sizes), strict=True):
            if len(part) == 0:
                continue
            graph = None if self._graphs is None else self._graphs.take((len(part), *z.shape[1:]))
            if graph is not None:
                graph.decode(part, pixels)
                continue
            part = part.to(self.device, self.dtype, memory_format=torch.channels_last)
            self._network(part, pixels)
        return images

    def _batches(self, n: int, latents: int) -> list[int]:
        """The sizes of the batches in which n images of h · w = ``latents`` are decoded."""
        if self.device.type == "cpu":
            return [1] * n if self.dtype == torch.float32 and n > 1 else [n]
        most, sizes = LARGEST_BATCH, list[int]()
        while n > 0:
            while most > n or (most > 1 and most * latents > LARGEST_BATCH_LATENTS):
                most //= 2
            sizes.append(most)
            n -= most
        return sizes or [0]


class Network:
    """The decoder's layers. They are apart from `LeanDecoder` because graphs refer to them too."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device, decoder = vae.config, dtype, device, vae.decoder
        post_quant, conv_in, conv_out = vae.post_quant_conv, decoder.conv_in, decoder.conv_out
        if leaves_sums(device):
            post_quant = _padded(post_quant, outputs=ALIGNMENT)
            conv_in = _padded(conv_in, inputs=ALIGNMENT)
            conv_out = _padded(conv_out, outputs=ALIGNMENT)
        self.post_quant = Pointwise(post_quant, dtype, device)
        self.conv_in = Conv(conv_in, dtype, device)
        shift, self.layers = self.conv_in.shift, list[Layer]()
        for module in _modules(decoder):
            layer = layer_of(module, shift, dtype, device)
            self.layers.append(layer)
            shift = layer.shift
        self.norm_out = Norm(decoder.conv_norm_out, device, shift)
        self.conv_out = Conv(conv_out, dtype, device)

    def empty_images(self, shape: Sequence[int]) -> Tensor:
        """Memory for the float32 images (N, 3, H, W) of latents of this shape."""
        n, _, h, w = shape
        f = self.config.downsampling
        size = (n, self.config.out_channels, f * h, f * w)
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def __call__(self, x: Tensor, pixels: Tensor) -> None:
        """Latents x (N, c, h, w), which are not changed, → float32 ``pixels`` (N, 3, H, W)."""
        x, add = self.conv_in(self.post_quant(x)), None
        for layer in self.layers:
            x, add = layer(x, add)
        x = self.conv_out(self.norm_out(x, add, over=True))
        if self.conv_out.shift is None:
            pixels.copy_(x)
        else:
            last = self.config.out_channels
            torch.add(x[:, :last], self.conv_out.shift[:last, None, None], out=pixels)


def _padded(conv: nn.Conv2d, inputs: int = 1, outputs: int = 1) -> nn.Conv2d:
    """The convolution, padded with zero channels to multiples of ``inputs`` and ``outputs``.

    cuDNN's kernels for tensor cores read and write 16 bytes of channels at a time.
    """
    m, c = conv.weight.shape[:2]
    channels, dtype = (c + -c % inputs, m + -m % outputs), conv.weight.dtype
    wide = nn.Conv2d(*channels, conv.kernel_size[0], device="meta", dtype=dtype)
    wide = wide.to_empty(device="cpu")
    assert conv.bias is not None and wide.bias is not None
    for parameter in wide.parameters():
        parameter.zero_()
    wide.weight[:m, :c], wide.bias[:m] = conv.weight, conv.bias
    return wide


def _modules(decoder: Decoder) -> Iterator[nn.Module]:
    """The modules between the decoder's first convolution and its last norm, in order."""
    first, last = decoder.mid_block.resnets
    yield first
    yield from getattr(decoder.mid_block, "attentions", ())
    yield last
    for level in decoder.up_blocks:
        assert isinstance(level, Level)
        yield from level.modules_in_order()


Key = tuple[int, ...]
"""(N, c, h, w) of the latents."""


class DecodeGraph(CapturedGraph):
    """One captured decode, from the graph's own latents to the graph's own pixels."""

    def __init__(
        self, network: Network, refused: set[Key], key: Key, turns: Turns, pool: Any
    ) -> None:
        super().__init__(key, turns)
        z = torch.zeros(key, dtype=network.dtype, device=network.device)
        self.z, self.pixels = z.to(memory_format=torch.channels_last), network.empty_images(key)
        stream = torch.cuda.current_stream(network.device)
        try:
            _CAPTURING.submit(self._capture, network, stream, pool).result()
        except RuntimeError:
            refused.add(key)  # `GraphCache` may drop graphs and try again, which clears this
            raise
        refused.discard(key)

    def _capture(self, network: Network, stream: torch.cuda.Stream, pool: Any) -> None:
        with torch.cuda.stream(stream), convolutions_measured():
            self.capture(lambda: network(self.z, self.pixels), pool)

    def decode(self, z: Tensor, pixels: Tensor) -> None:
        """Latents z (N, c, h, w) → the caller's ``pixels`` (N, 3, H, W)."""
        with self.turns.take(), torch.inference_mode():
            self.z.copy_(z)
            self.graph.replay()
            pixels.copy_(self.pixels)


class DecoderGraphs:
    """The captured decodes of one decoder. Threads may share it.

    A shape is captured at its second decode, if it is still among the last `GRAPH_LIMIT` shapes. A
    capture takes seconds, which a shape that occurs once, such as a last smaller batch, is not
    worth. A shape whose capture failed for lack of memory is not tried again.
    """

    def __init__(self, network: Network) -> None:
        self._seen = OrderedDict[Key, None]()
        self._refused = set[Key]()
        self._lock = threading.Lock()
        make = partial(DecodeGraph, network, self._refused)
        self._cache = GraphCache(network.device, make, lambda key: f"a decode of latents {key}")

    def take(self, key: Key) -> DecodeGraph | None:
        """The graph of ``key``, which threads share, or None to decode without a graph."""
        with self._lock:
            again = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > GRAPH_LIMIT:
                self._seen.popitem(last=False)
        return self._cache.take(key, alone=False) if again and key not in self._refused else None


_CAPTURING = ThreadPoolExecutor(1, "decoder-capture")
"""Decodes are captured in a separate thread. torch caches cuDNN's choice of algorithm per shape and
thread, even a choice made without measuring. In a thread that has decoded the shape before, nothing
would be measured. The cache, which graphs use, lives as long as its thread."""


@contextmanager
def convolutions_measured() -> Iterator[None]:
    """Inside the block, cuDNN measures its algorithms for convolutions that are new to the thread.

    It does not if the user has asked for deterministic algorithms, because two measurements could
    choose different ones. torch's switch is for the whole process, so other threads may measure
    too. Only one thread at a time may enter the block.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    try:
        if not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
            cudnn.benchmark = True
        yield
    finally:
        cudnn.benchmark = before
