"""DiT in plain torch with the official state-dict keys: the definition of correct.

Peebles & Xie 2022, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), and the
published code, facebookresearch/DiT ``models.py``.

Shape letters: N images, C latent channels, S latent side, p patch side, T tokens = (S/p)²,
D hidden size, H heads, d = D/H.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_engine.config import ModelConfig

FREQUENCY_EMBEDDING_SIZE = 256
NORM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) · (1 + scale (N, D)) + shift (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t: Tensor, spacing: int = 128) -> Tensor:
    """Sinusoids of the time step, cosines first.

    Args:
        t: (N,) time steps, 0 to 999, may be fractional.
        spacing: frequencies are 10000^(-i/spacing), i = 0 … 127; 128 in the paper's code, 127
            in diffusers (``downscale_freq_shift=1``).

    Returns:
        float32 (N, 256); the frequencies are float32 as in the published code.
    """
    return sinusoids(t, timestep_frequencies(spacing, t.device))


def timestep_frequencies(spacing: int = 128, device: torch.device | None = None) -> Tensor:
    """The frequencies of `timestep_embedding`, float32 (128,), in radians per time step."""
    half = FREQUENCY_EMBEDDING_SIZE // 2
    # The order of these float32 operations is the published code's: another order differs by an
    # ulp, which t multiplies by up to 999.
    index = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10000.0) * index / spacing)


def sinusoids(t: Tensor, frequencies: Tensor) -> Tensor:
    """cos and sin of t (N,) × float32 frequencies (128,) → float32 (N, 256)."""
    angles = t[:, None].float() * frequencies[None]  # (N, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(hidden_size: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a side × side grid, (1, side², D), float32.

    The first D/2 channels encode the column, the rest the row, each half as [sin, cos];
    computed in float64 and rounded once.
    """
    omega = 1.0 / 10000.0 ** (np.arange(hidden_size // 4) / (hidden_size / 4.0))  # (D/4,)
    angles = np.outer(np.arange(side, dtype=np.float64), omega)  # (side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, D/2)
    columns = np.broadcast_to(axis[None, :], (side, side, hidden_size // 2))
    rows = np.broadcast_to(axis[:, None], (side, side, hidden_size // 2))
    table = np.concatenate([columns, rows], axis=2).reshape(1, side * side, hidden_size)
    return torch.from_numpy(table).float()


class PatchEmbed(nn.Module):
    """Latents (N, C, S, S) → tokens (N, T, D), one per patch (paper, section 3.2, figure 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, S, S) → (N, T, D)
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time steps (N,) → (N, D): sinusoids (`timestep_embedding`), then two linear layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.spacing = 128 if config.numerics == "official" else 127
        d = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_EMBEDDING_SIZE, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor) -> Tensor:  # (N,) → (N, D)
        embedding = timestep_embedding(t, self.spacing)  # (N, 256)
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) → (N, D): a learned vector per class, and for the null class if there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, labels: Tensor) -> Tensor:  # (N,) → (N, D)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image, (N, T, D) → (N, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) → (N, T, D)
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, d // self.num_heads)  # (N, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, T, d)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, d), scaled by d^-0.5
        return self.proj(y.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them, (N, T, D) → (N, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) → (N, T, D)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (paper, section 3.2, figure 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d, eps=NORM_EPS, elementwise_affine=False)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(d, eps=config.mlp_norm_eps, elementwise_affine=False)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) → (N, T, D)
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 × (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * attended
        transformed = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x + gate_mlp.unsqueeze(1) * transformed


class FinalLayer(nn.Module):
    """adaLN and a linear layer: tokens (N, T, D) → patches (N, T, p·p·C_out)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, p = config.hidden_size, config.patch_size
        self.norm_final = nn.LayerNorm(d, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(d, p * p * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) → (N, T, p·p·C_out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The reference Diffusion Transformer.

    ``forward(x, t, y)``: x (N, C, S, S) noised latents, t (N,) time steps, y (N,) labels with
    ``config.null_class`` for "no label" → (N, C_out, S, S): epsilon and, with ``learn_sigma``,
    the variance's interpolation coefficient (see ``sampling/samplers.py``).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        side = config.input_size // config.patch_size
        if torch.get_default_device().type == "meta":
            table = torch.empty(1, config.num_tokens, config.hidden_size)
        else:
            table = position_embedding(config.hidden_size, side)
        self.pos_embed = nn.Parameter(table, requires_grad=False)  # (1, T, D), in the state dict
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (N,) and y (N,) → c (N, D), all that the blocks know of both; x has no part in it."""
        return self.t_embedder(t) + self.y_embedder(y)

    def forward_conditioned(self, x: Tensor, c: Tensor) -> Tensor:
        """The forward pass after ``condition``: x (N, C, S, S), c (N, D) → (N, C_out, S, S)."""
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            tokens = block(tokens, c)  # (N, T, D)
        return self.unpatchify(self.final_layer(tokens, c))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N, C, S, S), t (N,) and y (N,) → (N, C_out, S, S), see the class."""
        return self.forward_conditioned(x, self.condition(t, y))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, p·p·C_out) → (N, C_out, S, S)."""
        p = self.config.patch_size
        side = self.config.input_size // p
        patches = tokens.view(-1, side, side, p, p, self.config.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(  # n h w p q c → n c (h p) (w q)
            -1, self.config.out_channels, side * p, side * p
        )

    def initialize_weights(self) -> None:
        """The paper's initialisation for training: Xavier linears, zeroed modulations and output.

        Every block starts as the identity (adaLN-Zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
            elif name.startswith("t_embedder"):
                nn.init.normal_(parameter, std=0.02)
