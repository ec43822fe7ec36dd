"""DiT Engine: exact and fast inference for Diffusion Transformers."""

from typing import TYPE_CHECKING, Any

from dit_engine._version import __version__

if TYPE_CHECKING:
    from dit_engine.checkpoint import load_model
    from dit_engine.config import ModelConfig
    from dit_engine.engine import Engine

__all__ = ["Engine", "ModelConfig", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Importing the package stays free of torch, so that `--version` and `--help` answer at once.
    if name == "Engine":
        from dit_engine.engine import Engine

        return Engine
    if name == "ModelConfig":
        from dit_engine.config import ModelConfig

        return ModelConfig
    if name == "load_model":
        from dit_engine.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'dit_engine' has no attribute {name!r}")
