"""The options that commands share, and our names for mistyped or foreign options."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from dit_engine._version import __version__
from dit_engine.arguments import our_name
from dit_engine.io.printable import one_line


class _Help(argparse.HelpFormatter):
    """Shows the default of every option that has one besides None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        if not shown or not action.option_strings:
            return action.help
        return f"{action.help or ''} (default: {shown.replace('%', '%%')})".lstrip()


class Parser(argparse.ArgumentParser):
    """A parser with defaults in its help, with --version, and with one-line errors."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=_Help, allow_abbrev=False
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        hint = ""
        if unknown := re.match("unrecognized arguments: --([^ =]+)", message):
            options = [name[2:].replace("-", "_") for name in self._option_string_actions]
            ours = our_name(unknown[1].replace("-", "_"), options)
            hint = f"; did you mean --{ours.replace('_', '-')}?" if ours else ""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help){hint}\n")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help="file, directory, hub id, or 'builtin'")


# Options that are keywords of `load_checkpoint`.
_LOADING: dict[str, dict[str, Any]] = {
    "vae": {"help": "another VAE: file, directory or hub id"},
    "vae_scaling_factor": {"type": float, "metavar": "NUMBER",
        "help": "of a VAE file without config.json, or in place of its own"},
    "vae_shift_factor": {"type": float, "metavar": "NUMBER", "help": "the same for the shift"},
    "vae_groups": {"type": int, "metavar": "COUNT", "help": "the same for the group norms' groups"},
    "numerics": {"help": "official or diffusers (what the model was made for, unless given)"},
    "num_heads": {"type": int, "help": "for bare weight files of an unpublished width"},
    "prediction": {"help": "epsilon, v_prediction or sample, for files that do not tell it"},
}  # fmt: skip


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_checkpoint` that `loading_options` reads back."""
    for name, options in _LOADING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `load_checkpoint` from the arguments of `add_loading_arguments`."""
    return {name: getattr(arguments, name) for name in _LOADING}


def add_sampling_arguments(
    parser: argparse.ArgumentParser,
    steps: int | None = None,
    one_scale: bool = False,
    backend: bool = True,
) -> None:
    """Add the options of `Engine.generate` that `sampling_options` reads back.

    Args:
        steps: the default; None is the sampler's usual count.
        one_scale: the guidance scale is one number for all images.
        backend: whether there are options for the backend and its precision.
    """
    from dit_engine.sampling.schedule import SPACINGS

    scale = "1 is no guidance" if one_scale else "one, or one per image; 1 is no guidance"
    usual = "the sampler's usual count unless given" if steps is None else "of denoising"
    add = parser.add_argument
    add("--steps", type=int, default=steps,
        help=f"1 to 1000, or to what the model was trained with; {usual}")  # fmt: skip
    add("--sampler", default="ddpm", help="ddpm, ddim or dpm++")
    add("--spacing", help=f"{', '.join(SPACINGS)}; the sampler's usual one unless given")
    add("--eta", type=float, default=0.0, help="ddim: 0 deterministic, 1 as noisy as ddpm")
    add("--guidance-scale", type=float, nargs=1 if one_scale else "+", default=[4.0],
        metavar="SCALE", help=scale)  # fmt: skip
    add("--guidance-channels", type=_channels, default=3, metavar="COUNT",
        help="latent channels that are guided, or 'all'")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels between which guidance is on")  # fmt: skip
    if not backend:
        return
    add_backend_argument(parser)
    add("--precision", default="fp32", help="fp32, bf16 or fp16; lean also int8 (CPU), fp8 (CUDA)")


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    from dit_engine.backends import known_backends

    known = ", ".join(known_backends())
    parser.add_argument(
        "--backend", default="auto", help=f"{known}; a server as triton://HOST:PORT"
    )


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `Engine.generate` from the arguments of `add_sampling_arguments`."""
    scales, interval = arguments.guidance_scale, arguments.guidance_interval
    options = {
        "steps": arguments.steps,
        "sampler": arguments.sampler,
        "spacing": arguments.spacing,
        "eta": arguments.eta,
        "guidance_scale": scales[0] if len(scales) == 1 else scales,
        "guidance_channels": arguments.guidance_channels,
        "guidance_interval": None if interval is None else tuple(interval),
    }
    if "backend" in arguments:
        options |= {"backend": arguments.backend, "precision": arguments.precision}
    return options


def _channels(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of latent channels (1, 2, …) nor 'all'"
        ) from None
