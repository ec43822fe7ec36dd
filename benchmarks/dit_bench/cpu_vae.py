"""Decoding with a VAE: the peers of the lean decoder."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit_bench.peers import Function, Peer, openvino_function, randomise, relative_error
from dit_engine.vae import AutoencoderKL, VAEConfig

M = TypeVar("M", bound=nn.Module)


class Decode:
    """One batch of latents decoded by a VAE of random weights, and everyone who can do it."""

    def __init__(self, config: VAEConfig, side: int, batch: int, threads: int) -> None:
        self.vae, self.threads = random_vae(config), threads
        generator = torch.Generator().manual_seed(1)
        self.z = torch.randn(batch, config.latent_channels, side, side, generator=generator)
        self._twin: AutoencoderKL | None = None

    @property
    def twin(self) -> AutoencoderKL:
        if self._twin is None:
            self._twin = channels_last(copy.deepcopy(self.vae).bfloat16())
        return self._twin

    def expected(self) -> Tensor:
        with torch.inference_mode():
            return self.vae.decode(self.z)

    def bf16_error(self, expected: Tensor) -> float:
        with torch.inference_mode():
            return relative_error(self.eager()(), expected)

    def eager(self) -> Function:
        """In channels-last memory, which torch is quicker with."""
        twin = self.twin
        return lambda: twin.decode(self._half()).float()

    def diffusers(self) -> Function:
        theirs = diffusers_autoencoder(self.twin)  # in channels-last memory, as the twin is
        return lambda: theirs.decode(self._half()).sample.float()

    def openvino(self) -> Function:
        return openvino_function(DecodeModule(self.vae), (self.z,), "bf16", self.threads)

    def lean(self) -> Function:
        from dit_engine.backends.lean.vae import LeanDecoder

        decode = LeanDecoder(self.vae, torch.bfloat16, "cpu")
        return lambda: decode(self.z)

    def _half(self) -> Tensor:
        return self.z.to(torch.bfloat16, memory_format=torch.channels_last)


def decode_peers(decode: Decode) -> list[Peer]:
    return [
        Peer("openvino bf16", "bf16", decode.openvino),
        Peer("diffusers bf16", "bf16", decode.diffusers),
        Peer("eager bf16", "bf16", decode.eager),
        Peer("lean bf16", "bf16", decode.lean),
    ]


class DecodeModule(nn.Module):
    """`AutoencoderKL.decode` as a forward, for exporters."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


def channels_last(module: M) -> M:
    """Convolution weights in channels-last memory, in place."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def random_vae(config: VAEConfig, seed: int = 0) -> AutoencoderKL:
    """Random weights; the norms' scales lie around one, as a trained network's do."""
    vae = AutoencoderKL(config)
    randomise(vae, seed)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(1)
    return vae.eval().requires_grad_(False)


def diffusers_autoencoder(vae: AutoencoderKL) -> Any:
    """diffusers' AutoencoderKL on the tensors of ``vae``. Raises ImportError without diffusers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    config = vae.config
    depth = len(config.block_out_channels)
    values = {key: value for key, value in asdict(config).items() if key != "scaling_factor"}
    values["down_block_types"] = ("DownEncoderBlock2D",) * depth
    values["up_block_types"] = ("UpDecoderBlock2D",) * depth
    theirs: Any
    with torch.device("meta"):
        theirs = Theirs(**values)
    theirs.load_state_dict(vae.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)
