"""ModelConfig: the shape of a Diffusion Transformer, and the twelve published ones."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion

# depth, hidden size, heads (Peebles & Xie 2022, table 1)
FAMILIES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (2, 4, 8)
PUBLISHED = tuple(f"DiT-{family}/{p}" for family in FAMILIES for p in PATCH_SIZES)

NUMERICS = ("official", "diffusers")
NO_NULL_CLASS = (
    "the model has no null class to guide with (its label table has a row for each class and no "
    "other: it was trained without dropping labels)"
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a DiT's tensors and arithmetic.

    Attributes:
        input_size: side S of the square latent, in latent pixels (image side / 8 for SD's VAE).
        learn_sigma: the model predicts a variance beside epsilon (2·in_channels outputs).
        numerics: "official" is facebookresearch/DiT; "diffusers" is DiTTransformer2DModel, whose
            time-step frequencies are spaced by 1/127 instead of 1/128 (another function of t).
        mlp_norm_eps: epsilon of each block's second LayerNorm; every other is 1e-6. Diffusers
            directories may hold another value here (`norm_eps`).
        diffusion: what the model was trained to undo.
        has_null_class: whether the label table has one more row, for "no label". A model that was
            trained without dropping labels has none, and cannot be guided.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int = 4
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    numerics: Literal["official", "diffusers"] = "official"
    mlp_norm_eps: float = 1e-6
    diffusion: Diffusion = PUBLISHED_DIFFUSION
    has_null_class: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "input_size",
                     "in_channels", "num_classes"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r} is not a positive integer")
        for name, divisor, kind in (
            ("hidden_size", self.num_heads, "num_heads "),
            ("hidden_size", 4, ""),
            ("input_size", self.patch_size, "patch_size "),
        ):
            if (value := getattr(self, name)) % divisor:
                raise ValueError(f"{name} {value} is not a multiple of {kind}{divisor}")
        for name, most in (("mlp_ratio", 1e300), ("mlp_norm_eps", 1)):
            value = getattr(self, name)
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not real or not 0 < value < math.inf:
                raise ValueError(f"{name} {value!r} is not a finite number above 0")
            if value > most:
                raise ValueError(f"{name} {value!r} is above {most}")
            object.__setattr__(self, name, float(value))
        for name in ("learn_sigma", "has_null_class"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither True nor False")
        if self.numerics not in NUMERICS:
            raise ValueError(f"numerics {self.numerics!r}: choose one of {', '.join(NUMERICS)}")
        if not isinstance(self.diffusion, Diffusion):
            raise ValueError(f"diffusion {self.diffusion!r} is no Diffusion")

    @cached_property
    def num_tokens(self) -> int:
        """T, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the latents of one image."""
        return self.in_channels, self.input_size, self.input_size

    @cached_property
    def mlp_hidden_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @cached_property
    def out_channels(self) -> int:
        """Channels of the model's output; the second half, if any, is the variance's."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @cached_property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.has_null_class

    @cached_property
    def null_class(self) -> int:
        """Label of the unconditional class: one past the last. Raises ValueError without one."""
        if not self.has_null_class:
            raise ValueError(NO_NULL_CLASS)
        return self.num_classes

    @classmethod
    def named(cls, name: str, image_size: int = 256, **overrides: Any) -> ModelConfig:
        """One of the twelve published sizes: "DiT-XL/2" … "DiT-S/8", with or without "DiT-".

        Args:
            image_size: pixels along a side; the latent is an eighth of it.
            overrides: other fields, such as ``num_classes`` or ``learn_sigma``.

        Raises:
            ValueError: an unknown name, a size that does not divide into patches, or an
                unknown field.
        """
        match = re.fullmatch(r"(?:DiT-)?(S|B|L|XL)[/-]([248])", name)
        if not match:
            raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(PUBLISHED)}")
        patch_size = int(match[2])
        if not isinstance(image_size, int) or image_size < 1 or image_size % (8 * patch_size):
            raise ValueError(
                f"image_size {image_size!r} is not a positive multiple of {8 * patch_size}, "
                f"as {name} needs"
            )
        depth, hidden_size, num_heads = FAMILIES[match[1]]
        values = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads,
                  "patch_size": patch_size, "input_size": image_size // 8}  # fmt: skip
        return cls.from_dict(values | overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The reverse of `to_dict`. Raises ValueError for an unknown or a missing key."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"config key {key!r} is unknown; known are {', '.join(known)}")
        for key in known[:5]:
            if key not in values:
                raise ValueError(f"config key {key!r} is missing")
        if isinstance(given := values.get("diffusion"), dict):
            values = values | {"diffusion": Diffusion.from_dict(given)}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `from_dict` takes them. ``diffusion`` is left out if it is the published
        one, and ``has_null_class`` if it is true."""
        values = asdict(self) | {"diffusion": self.diffusion.to_dict()}
        published = {"diffusion": {}, "has_null_class": True}
        return {k: v for k, v in values.items() if k not in published or v != published[k]}
