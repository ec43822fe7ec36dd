"""The graphs of an export as modules: float32 and int64 at the ends, the export's dtype inside.

They hold the reference model (`dit_engine.model`, `dit_engine.vae`) and use plain torch, so that
every operator has a standard ONNX form. Shape letters are those of `dit_engine.model`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dit_engine.config import ModelConfig
from dit_engine.model import DiT, TimestepEmbedder, modulate, sinusoids, timestep_frequencies
from dit_engine.vae import AutoencoderKL, VAEConfig
from dit_export.bundle import TensorSpec
from dit_export.targets import VAE_GRAPH

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The names of a block's four linear layers, which hold nearly all of the arithmetic."""

MakeLayer = Callable[[str, nn.Linear], nn.Module]


class MatMulLinear(nn.Module):
    """A linear layer over tokens whose weight is kept as MatMul reads it, (in, out).

    torch's own form would put a Transpose before every MatMul, or a nameless copy of the weight
    after an optimiser has folded the Transpose away.
    """

    def __init__(self, _: str, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)  # (in, out)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, in) → (N, T, out)
        return torch.matmul(x, self.weight) + self.bias


class ConstantFrequencies(nn.Module):
    """The time step's embedder with its frequencies as a constant of the graph.

    If their exponentials were in the graph, another library's exp would compute half of them an ulp
    away from torch's, and t multiplies that by up to 999.
    """

    frequencies: Tensor

    def __init__(self, embedder: TimestepEmbedder) -> None:
        super().__init__()
        self.mlp = embedder.mlp
        frequencies = timestep_frequencies(embedder.spacing)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:  # (N,) → (N, D)
        embedding = sinusoids(t, self.frequencies)  # (N, 256)
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))


def exportable(model: DiT, dtype: torch.dtype, layer: MakeLayer = MatMulLinear) -> DiT:
    """A twin on the CPU in ``dtype``, whose layers over tokens are `MatMulLinear`.

    Weights that have the dtype already are shared; others are converted one by one.

    layer: (name, layer in ``dtype``) → what replaces it, for each block's four linear layers.
    """
    with torch.device("meta"):
        twin = DiT(model.config).requires_grad_(False)  # weights may be inference tensors
    _load(twin, model, dtype)
    replace_linears(twin, LINEARS, layer)
    replace_linears(twin, ("final_layer.linear",), MatMulLinear)
    twin.register_module("t_embedder", ConstantFrequencies(twin.t_embedder))
    return twin.eval().requires_grad_(False)


def _load(twin: nn.Module, original: nn.Module, dtype: torch.dtype) -> None:
    state = {name: value.to("cpu", dtype) for name, value in original.state_dict().items()}
    twin.load_state_dict(state, assign=True)


def replace_linears(model: nn.Module, ends: tuple[str, ...], made: MakeLayer) -> None:
    """Replace each linear layer whose name ends in one of ``ends`` by ``made(name, linear)``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ends):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, made(name, module))


class TransformerGraph(nn.Module):
    """A graph over a DiT from `exportable`, whose dtype is that of its arithmetic."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.dit = model


class Transformer(TransformerGraph):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # → (N, C_out, S, S)
        return self.dit(x.to(self.dit.pos_embed.dtype), t, y).float()


class GuidedStep(TransformerGraph):
    """One whole step of any sampler, as `dit_kernels.guided_step`. But each image has its own step,
    and so its own row of coefficients (N, 9): requests at different steps can share a batch.

    Every image is computed with and without its label; an image at scale 1 exactly is not guided.
    At s = 0 the noise is not read. A model without a learned variance adds s·noise. The rows of a
    schedule come from `dit_engine.sampling.coefficients.step_coefficients`.
    """

    def __init__(self, model: DiT, guided_channels: int) -> None:
        super().__init__(model)
        self.guided_channels = guided_channels

    def forward(
        self,
        z: Tensor,
        x0_before: Tensor,
        noise: Tensor,
        t: Tensor,
        y: Tensor,
        guidance_scale: Tensor,
        coefficients: Tensor,
    ) -> tuple[Tensor, Tensor]:
        config, g = self.dit.config, self.guided_channels
        c, wide = config.in_channels, z.to(self.dit.pos_embed.dtype)
        labels = torch.cat([y, torch.full_like(y, config.null_class)])  # (2N,)
        output = self.dit(torch.cat([wide, wide]), torch.cat([t, t]), labels)  # (2N, C_out, S, S)
        n = z.shape[0]
        cond, uncond = output[:n].float(), output[n:].float()  # each (N, C_out, S, S)
        scale = guidance_scale[:, None, None, None]  # (N, 1, 1, 1)
        guided = uncond[:, :g] + scale * (cond[:, :g] - uncond[:, :g])
        guided = torch.where(scale == 1, cond[:, :g], guided)
        eps = torch.cat([guided, cond[:, g:c]], dim=1) if g < c else guided  # (N, C, S, S)
        rows = coefficients[:, :, None, None, None].unbind(1)  # 9 × (N, 1, 1, 1)
        x0_z, x0_eps, to_x0, to_z, to_eps, to_before, low, high, std = rows
        x0 = x0_z * z + x0_eps * eps
        if config.learn_sigma:  # learned variance: between the logarithms low and high
            std = std * torch.exp(0.5 * (low + (cond[:, c:] + 1) / 2 * (high - low)))
        mean = to_x0 * x0 + to_z * z + to_eps * eps + to_before * x0_before
        return torch.where(std == 0, mean, mean + std * noise), x0


class Conditioner(TransformerGraph):
    """All modulations of (t, y): 6·D for each block in its own order, then 2·D of the last layer.

    `Conditioner` and `Denoiser` are the two parts of the transformer. The conditioner has a third
    of the weights, does not depend on the latents, and can run before the sampling loop.
    """

    def forward(self, t: Tensor, y: Tensor) -> Tensor:  # (N,), (N,) → (N, 6·D·depth + 2·D)
        c = self.dit.condition(t, y)  # (N, D)
        layers = [*self.dit.blocks, self.dit.final_layer]
        return torch.cat([layer.adaLN_modulation(c) for layer in layers], dim=1).float()  # pyright: ignore[reportCallIssue]


class Denoiser(TransformerGraph):
    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:  # → (N, C_out, S, S)
        dit, dtype = self.dit, self.dit.pos_embed.dtype
        depth, d = dit.config.depth, dit.config.hidden_size
        parts = modulations.to(dtype).split([6 * d] * depth + [2 * d], dim=1)
        tokens = dit.x_embedder(x.to(dtype)) + dit.pos_embed  # (N, T, D)
        for block, part in zip(dit.blocks, parts, strict=False):
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = part.chunk(6, dim=1)
            attended = block.attn(modulate(block.norm1(tokens), shift_msa, scale_msa))  # pyright: ignore
            tokens = tokens + gate_msa.unsqueeze(1) * attended
            moved = block.mlp(modulate(block.norm2(tokens), shift_mlp, scale_mlp))  # pyright: ignore
            tokens = tokens + gate_mlp.unsqueeze(1) * moved
        shift, scale = parts[-1].chunk(2, dim=1)
        final = dit.final_layer
        tokens = final.linear(modulate(final.norm_final(tokens), shift, scale))
        return dit.unpatchify(tokens).float()


class VAEDecoder(nn.Module):
    """The sampler's latents → images in about [-1, 1]."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        with torch.device("meta"):
            self.vae = AutoencoderKL(vae.config)
        _load(self.vae, vae, dtype)
        replace_linears(self.vae, ("",), MatMulLinear)  # all of them: the mid block's attention
        self.vae.eval().requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:  # (N, c, h, w) → (N, 3, H, W)
        z = self.vae.config.denormalise(z).to(self.dtype)
        return self.vae.decode(z).float()


def transformer_graph(name: str, model: DiT, guided_channels: int) -> nn.Module:
    """The module of one of `TRANSFORMER_GRAPHS` over an `exportable` model."""
    if name == "guided_step":
        return GuidedStep(model, guided_channels).eval()
    kinds = {"transformer": Transformer, "conditioner": Conditioner, "denoiser": Denoiser}
    return kinds[name](model).eval()


def modulation_width(config: ModelConfig) -> int:
    return (6 * config.depth + 2) * config.hidden_size


def signature(
    name: str, config: ModelConfig, vae: VAEConfig | None
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of graph ``name``, in order."""
    c, s = config.in_channels, config.input_size

    def real(tensor: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(tensor, "float32", ("batch", *shape))

    if name == VAE_GRAPH:
        assert vae is not None
        f = vae.downsampling
        sizes = (f"{f}*height", f"{f}*width") if f > 1 else ("height", "width")
        z = real("z", vae.latent_channels, "height", "width")
        return (z,), (real("images", vae.out_channels, *sizes),)
    condition = (TensorSpec("t", "int64", ("batch",)), TensorSpec("y", "int64", ("batch",)))
    x, modulations = real("x", c, s, s), real("modulations", modulation_width(config))
    output = real("output", config.out_channels, s, s)
    latents = tuple(real(tensor, c, s, s) for tensor in ("z", "x0_before", "noise"))
    step = (*latents, *condition, real("guidance_scale"), real("coefficients", 9))
    return {
        "transformer": ((x, *condition), (output,)),
        "guided_step": (step, (real("z_next", c, s, s), real("x0", c, s, s))),
        "conditioner": (condition, (modulations,)),
        "denoiser": ((x, modulations), (output,)),
    }[name]
