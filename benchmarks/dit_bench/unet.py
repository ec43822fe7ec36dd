"""The U-Net that the DiT paper compares with: LDM-4 of Rombach et al. 2022, 256 px, by class.

Its published configuration (channels 192 × (1, 2, 3, 5), two residual blocks per level, attention
with a class embedding of 512 as context below the first level, one head, one transformer layer) is
rebuilt with diffusers' UNet2DConditionModel; the weights are random. The paper gives it
103.6 Gflops and 400 M parameters; torch counts 104.23 GMACs and 400.9 M for this one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dit_bench.contenders import Function
from dit_bench.cost import Cost

CHANNELS, SIDE, CONTEXT, CLASSES = 3, 64, 512, 1000  # latents (3, 64, 64): downsampling 4
PUBLISHED_GFLOPS, PUBLISHED_MILLIONS = 103.6, 400
NAME = "LDM-4 U-Net"


class ClassConditionedUNet(nn.Module):
    """(x, t, y): latents (N, 3, 64, 64), time steps (N,), classes (N,) → (N, 3, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'dit-engine[diffusers]'") from error
        self.unet = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(192, 384, 576, 960),
            layers_per_block=2,
            cross_attention_dim=CONTEXT,
            attention_head_dim=1,  # diffusers takes it for the number of heads
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        )
        self.embedding = nn.Embedding(CLASSES + 1, CONTEXT)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        context = self.embedding(y).unsqueeze(1)  # (N, 1, 512)
        return self.unet(x, t, encoder_hidden_states=context).sample


@lru_cache(maxsize=1)
def unet_cost() -> Cost:
    """By torch's operator counting on tensors without storage; the embedding table left out."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = ClassConditionedUNet().eval().requires_grad_(False)
        x, index = torch.empty(1, CHANNELS, SIDE, SIDE), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        module(x, index, index)
    return Cost(sum(p.numel() for p in module.unet.parameters()), counter.get_total_flops() // 2)


def unet_forward(images: int, device: torch.device, dtype: torch.dtype) -> Function:
    """The U-Net on random latents and classes of N images, in eager torch with channels-last
    weights, with which its convolutions are quicker. Raises RuntimeError for a result that is not
    finite, which is all that there is to check."""
    draw = torch.Generator().manual_seed(images)
    latents = torch.randn(images, CHANNELS, SIDE, SIDE, generator=draw).to(device)
    y = torch.randint(CLASSES, (images,), generator=draw).to(device)
    t = torch.full((images,), 400, device=device)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = ClassConditionedUNet().to(device, dtype).eval()
    module = module.requires_grad_(False).to(memory_format=torch.channels_last)

    def run() -> Tensor:
        x = latents.to(dtype, memory_format=torch.channels_last)
        return module(x, t, y).float()

    if not bool(run().isfinite().all()):
        raise RuntimeError("its result is not finite")
    return run
