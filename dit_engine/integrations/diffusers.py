"""Replace the transformer of an existing diffusers ``DiTPipeline`` by ours.

Example:
    pipe = accelerate(DiTPipeline.from_pretrained("facebook/DiT-XL-2-256"))
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.checkpoint.convert import (
    STORED_POSITIONS,
    config_from_diffusers,
    state_from_diffusers,
    state_to_diffusers,
)
from dit_engine.checkpoint.weights import without_storage
from dit_engine.model import DiT
from dit_engine.runtime import neutral


class DiTAdapter(nn.Module):
    """Our forward pass behind ``DiTTransformer2DModel``'s call and attributes.

    Args:
        model: (x, t, y) → (N, C_out, S, S), here the reference module.
        config: what the pipeline and its scheduler read (sample_size, out_channels, …).
    """

    def __init__(self, model: DiT, config: Any) -> None:
        super().__init__()
        self.model = model
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states (N, C, S, S), timestep (N,) or one for all, class_labels (N,) → sample
        (N, C_out, S, S), in a Transformer2DModelOutput or, without ``return_dict``, a tuple."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if timestep is None or class_labels is None:
            raise ValueError("timestep and class_labels are needed: a DiT is conditioned on both")
        if cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs {cross_attention_kwargs!r}: only None works")
        times = timestep.reshape(-1).expand(hidden_states.shape[0])
        sample = self.model(hidden_states, times, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Write these weights to the directory that a DiTTransformer2DModel would write."""
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        state = {key: tensor.detach() for key, tensor in self.model.state_dict().items()}
        with without_storage():
            theirs: Any = DiTTransformer2DModel.from_config(self.config)
        theirs.load_state_dict(state_to_diffusers(state, self.model.config.depth), assign=True)
        theirs.save_pretrained(
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **options,
        )


@cache
def _diffusers_class() -> type[DiTAdapter]:
    """`DiTAdapter` as a component that diffusers can save: a ModelMixin with the name of the class
    that can load it again."""
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    name, module = DiTTransformer2DModel.__name__, DiTTransformer2DModel.__module__
    return type(name, (DiTAdapter, ModelMixin), {"__module__": module, "__reduce__": _reduced})


def _reduced(adapter: DiTAdapter) -> tuple[Any, ...]:
    return _blank, (), vars(adapter)


def _blank() -> DiTAdapter:
    # For copy and pickle, because the class has the name of another class.
    return _diffusers_class().__new__(_diffusers_class())


@neutral()
def accelerate(pipe: Any) -> Any:
    """Replace ``pipe.transformer`` by our model with the same weights, and return ``pipe``.

    The arithmetic stays diffusers' own (numerics "diffusers"), so images are equal within
    rounding. The weights are shared with the old transformer, except the packed q, k and v. What
    ``pipe.save_pretrained`` writes is a DiTPipeline as before. Raises ValueError for another
    pipeline, and for a transformer whose options are not a DiT's.
    """
    transformer: Any = getattr(pipe, "transformer", None)
    if isinstance(transformer, DiTAdapter):
        return pipe
    name = type(transformer).__name__
    if name != "DiTTransformer2DModel":
        raise ValueError(
            f"the transformer of {type(pipe).__name__} is a {name}; "
            f"a DiTPipeline's DiTTransformer2DModel is needed"
        )
    config = config_from_diffusers(transformer.config)
    state = {key: tensor.detach() for key, tensor in transformer.state_dict().items()}
    state[STORED_POSITIONS] = transformer.pos_embed.pos_embed
    with without_storage():
        model = DiT(config)
    model.load_state_dict(state_from_diffusers(state, config), assign=True)
    pipe.transformer = _diffusers_class()(model, transformer.config).eval()
    return pipe
