"""What the engine's backends are compared with: other libraries and compilers on our weights, and
the paper's U-Net."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit_bench.contenders import Function
from dit_bench.cost import CONTEXT, UNET_SHAPE, make_unet
from dit_bench.subjects import twin
from dit_engine.backends.capture import capture_graph
from dit_engine.backends.compile import compile_static
from dit_engine.checkpoint.convert import official_to_diffusers
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL

M = TypeVar("M", bound=nn.Module)
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
CLASSES = 1000  # of the U-Net


def compiled(module: DiT, form: str, *inputs: Tensor) -> Forward:
    """torch.compile of the reference model for this one shape, which is its best case.

    form: "compile"; or "compile frozen", with constant weights, which the compiler packs as lean
    does.
    """

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return module(x, t, y)

    run = compile_static(forward)
    if form == "compile frozen":
        from torch._inductor import config

        with config.patch(freezing=True), torch.no_grad():  # compiled at the first call
            run(*inputs)
    return run


def autotuned_blocks(model: DiT) -> Forward:
    """The model whose blocks run under torch.compile in the mode max-autotune-no-cudagraphs.

    As in diffusers' ``compile_repeated_blocks``, one compilation serves all blocks; that of a whole
    XL/2 takes minutes. The rest of the model runs eagerly. The caller captures a CUDA graph of all.
    """

    def run(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        return block(x, c)

    own = twin(model)  # ``model`` must not be changed
    block_forward = compile_static(run, mode="max-autotune-no-cudagraphs")
    for ours, block in zip(own.blocks, model.blocks, strict=True):
        ours.forward = partial(block_forward, block)
    return own


def graphed(forward: Callable[[], Tensor], device: torch.device) -> Function:
    """A function that replays a CUDA graph of ``forward``: the best time that it could reach if
    launches cost nothing. Raises ValueError without CUDA."""
    if device.type != "cuda":
        raise ValueError("CUDA graphs need a CUDA device")
    forward()  # compiles and measures, which must not be captured
    graph, result = capture_graph(forward, torch.cuda.Stream(device))

    def run() -> Tensor:
        graph.replay()
        return result

    return run


def diffusers_transformer(model: DiT) -> Any:
    """diffusers' DiTTransformer2DModel on the tensors of ``model``, which it shares.

    Raises ImportError without diffusers, ValueError for numerics that diffusers does not compute.
    """
    config = model.config
    if config.numerics != "diffusers":
        raise ValueError(f"numerics {config.numerics!r}: diffusers computes only 'diffusers'")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    options: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "num_layers": config.depth, "sample_size": config.input_size,
        "patch_size": config.patch_size, "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }  # fmt: skip
    state = diffusers_state(model.state_dict(), config.depth)
    theirs = _on_tensors(lambda: DiTTransformer2DModel(**options), state)
    theirs.pos_embed.pos_embed = model.pos_embed.detach()
    return theirs


def diffusers_state(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The official state dict → diffusers', without copies: q, k and v are views of qkv."""
    theirs: dict[str, Tensor] = {}
    for official, names in official_to_diffusers(depth):
        theirs |= zip(names, state[official].chunk(len(names)), strict=True)
    first = "transformer_blocks.0.norm1.emb."
    embedders = {key: tensor for key, tensor in theirs.items() if key.startswith(first)}
    for i in range(1, depth):
        theirs |= {key.replace(".0.", f".{i}.", 1): tensor for key, tensor in embedders.items()}
    return theirs


def diffusers_autoencoder(vae: AutoencoderKL) -> Any:
    """diffusers' AutoencoderKL on the tensors of ``vae``. Raises ImportError without diffusers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    depth = len(vae.config.block_out_channels)
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
    }
    return _on_tensors(lambda: Theirs(**asdict(vae.config), **options), vae.state_dict())


def _on_tensors(make: Callable[[], Any], state: Mapping[str, Tensor]) -> Any:
    with torch.device("meta"):
        module = make()
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def channels_last(module: M) -> M:
    """Convolution weights in channels-last memory, in place."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


class Method(nn.Module):
    """One method of ``module`` as a forward, for exporters."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.module, self.name)(*inputs)


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's one Core of this process, which is never deleted.

    The CPU plugin of each Core sets the thread's stack for signals, and restores the earlier one
    when the Core is deleted. Two Cores that are not deleted in reverse order leave freed memory as
    the stack, and the process dies at the next Ctrl-C.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    return openvino.Core()


def openvino_function(
    module: nn.Module, arguments: tuple[Tensor, ...], precision: str, threads: int
) -> Function:
    """``module`` (float32) for exactly these shapes under OpenVINO's CPU plugin.

    Raises ImportError without openvino, ValueError for an unknown precision, RuntimeError if
    OpenVINO would run in another one.
    """
    if arguments[0].device.type != "cpu":
        raise ValueError("OpenVINO runs on the CPU here")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r}: OpenVINO is measured in fp32 and bf16")
    import openvino  # pyright: ignore[reportMissingImports]

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its exporter's parts
        converted = openvino.convert_model(torch.export.export(module, arguments))
    options = {
        "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    compiled_model = openvino_core().compile_model(converted, "CPU", options)
    used = compiled_model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != hint:
        raise RuntimeError(f"OpenVINO runs {used} on this processor, not {hint}")
    request = compiled_model.create_infer_request()
    inputs = [argument.numpy() for argument in arguments]

    def run() -> Tensor:
        outputs = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return run


def unet_forward(images: int, device: torch.device, dtype: torch.dtype) -> Function:
    """The U-Net on random latents and classes of N images, in eager torch with channels-last
    weights, which make its convolutions quicker. Raises RuntimeError for a result that is not
    finite; nothing else can be checked."""
    draw = torch.Generator().manual_seed(images)
    latents = torch.randn(images, *UNET_SHAPE, generator=draw).to(device)
    y = torch.randint(CLASSES, (images,), generator=draw).to(device)
    t = torch.full((images,), 400, device=device)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = nn.ModuleList([make_unet(), nn.Embedding(CLASSES + 1, CONTEXT)])
    unet, table = channels_last(modules.to(device, dtype).eval().requires_grad_(False))

    def run() -> Tensor:
        x = latents.to(dtype, memory_format=torch.channels_last)
        return unet(x, t, encoder_hidden_states=table(y).unsqueeze(1)).sample.float()

    if not bool(run().isfinite().all()):
        raise RuntimeError("its result is not finite")
    return run
