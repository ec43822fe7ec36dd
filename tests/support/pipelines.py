"""Small random models of diffusers, which are the reference for reading and sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def transformer(**overrides: Any) -> Any:
    """A DiTTransformer2DModel with random weights and, as in a DiT, the same embedders per block.

    DiTPipeline's null class is 1000, whatever the model's number of classes.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    values = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "sample_size": 8,
              "patch_size": 2, "out_channels": 8, "num_embeds_ada_norm": 1000}  # fmt: skip
    model = diffusers.DiTTransformer2DModel(**(values | overrides)).eval()
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        torch.nn.init.normal_(parameter, std=scale)
    embedder = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    return model


def autoencoder(*widths: int, **options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **options,
    ).eval()


def pipeline(**overrides: Any) -> Any:
    """A DiTPipeline with DDIM and without clipping, as the published one."""
    diffusers = pytest.importorskip("diffusers")
    vae = autoencoder(8, 16, norm_num_groups=4)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer(**overrides), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
