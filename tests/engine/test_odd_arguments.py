"""Whatever is given as an argument is taken, or a ValueError of one line names the argument."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit, tiny_engine, tiny_vae

from dit_engine import Engine, Generation
from dit_engine.errors import NotFinite
from dit_engine.plan import parse_scales
from dit_engine.results import call_record

Z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))


class Odd:
    """Answers every question with an error."""

    def __index__(self) -> int:
        raise TypeError("no index")

    def __float__(self) -> float:
        raise ValueError("no float")

    def __iter__(self) -> Any:
        raise TypeError("no iteration")

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    def __bool__(self) -> bool:
        raise ValueError("no truth")

    __hash__ = None  # type: ignore[assignment]


ODD: dict[str, Any] = {
    "true": True, "false": False, "zero": 0, "one": 1, "minus": -1, "seven": 7, "big": 2**63 - 1,
    "huge": 10**5000, "half": 0.5, "nan": math.nan, "infinity": math.inf, "1e38": 1e38,
    "float2": 2.0, "complex": 1j, "empty": "", "text": "2", "word": "fp32", "long": "9" * 5000,
    "lines": "a\nb", "nul": "\0", "bytes": b"2", "bytearray": bytearray(b"2"),
    "list": [], "ones": [1],
    "two": [1, 2], "pair": (0.5, 2), "texts": ["1", "2"], "nones": [None], "nested": [[1]],
    "ragged": [[1], [1, 2]], "dict": {}, "map": {1: 2}, "set": {1}, "range": range(1),
    "generator": (i for i in range(1)), "function": id, "count": itertools.count(),
    "memory": memoryview(b"2"),
    "type": tuple, "array type": np.ndarray, "tensor type": torch.Tensor, "object": object(),
    "odd": Odd(), "odds": [Odd()], "decimal": Decimal("1.5"), "fraction": Fraction(1, 2),
    "np.int64": np.int64(1), "np.uint8": np.uint8(2), "np.float16": np.float16(0.5),
    "np.bool": np.bool_(True), "np.str": np.str_("ddim"), "np 0-d": np.array(1),
    "np 0-d text": np.array("fp32"), "np ints": np.array([1]), "np bools": np.array([True]),
    "np floats": np.array([0.5, 2.0]), "np 2-d": np.ones((1, 1)), "np none": np.zeros(0),
    "np texts": np.array(["ant"]), "np objects": np.array([None], object),
    "np date": np.datetime64("2026-01-01"), "tensor 0-d": torch.tensor(1),
    "tensor": torch.tensor([1]), "tensor bool": torch.tensor(True),
    "tensor bools": torch.tensor([True]), "tensor float": torch.tensor(0.5),
    "tensor floats": torch.tensor([0.5, 2.0]), "tensor 2-d": torch.ones(1, 1),
    "tensor complex": torch.tensor([1j]), "tensor grad": torch.ones(1, requires_grad=True),
    "tensor meta": torch.empty(1, device="meta"), "tensor meta 0-d": torch.empty((), device="meta"),
    "tensor sparse": torch.ones(1).to_sparse(), "tensor none": torch.empty(0),
    "latents": Z, "latents complex": Z.to(torch.complex64), "latents int": Z.long(),
    "latents bool": Z > 0, "latents half": Z.half(), "latents np": Z.double().numpy(),
    "latents list": Z.tolist(), "latents meta": Z.to("meta"), "latents sparse": Z.to_sparse(),
    "latents strided": Z.flip(3).transpose(2, 3), "latents np strided": Z.numpy()[..., ::-1],
    "latents np int": Z.long().numpy(), "latents 1e300": np.full((1, 4, 8, 8), 1e300),
    "device": torch.device("cpu"), "device meta": torch.device("meta"), "dtype": torch.float32,
}  # fmt: skip

ARGUMENTS = (
    "labels", "steps", "sampler", "spacing", "eta", "guidance_scale", "guidance_channels",
    "guidance_interval", "seed", "seeds", "noise", "latents", "step_noise", "backend", "precision",
    "output", "callback",
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def refused(argument: str, error: Exception) -> None:
    text = str(error)
    assert isinstance(error, ValueError), repr(error)
    assert argument.rstrip("s") in text and "\n" not in text and len(text) < 400, text


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_odd_values_of_generate(engine: Engine, argument: str) -> None:
    usual = {"labels": [1], "steps": 2, "output": "latent", "sampler": "ddim"}
    taken = []
    for name, value in ODD.items():
        if argument == "callback" and callable(value):
            continue  # and would be called
        if argument == "labels" and name == "count":
            continue  # labels may be an iterator, but one that ends
        made: list[Generation] = []
        error = raised(lambda: made.append(engine.generate(**(usual | {argument: value}))))  # noqa: B023
        if error is None:
            taken.append(name)
            json.dumps(call_record(made[0]))
        elif not isinstance(error, NotFinite):  # 1e38 is a scale
            refused(argument, error)
    assert {"true", "false", "odd", "object"}.isdisjoint(taken)


@pytest.mark.parametrize(
    "argument",
    ["device", "max_batch_size", "threads", "label_names", "sources", "model", "vae"],
)
def test_odd_values_of_engine(argument: str) -> None:
    usual = {"model": tiny_dit(), "vae": tiny_vae(), "device": "cpu"}
    for value in ODD.values():
        if (error := raised(lambda: Engine(**(usual | {argument: value})))) is not None:  # noqa: B023
            refused(argument, error)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": np.int64(2)}, {"steps": 2}),
        ({"steps": torch.tensor(2)}, {"steps": 2}),
        ({"eta": np.float32(0.5)}, {"eta": 0.5}),
        ({"guidance_scale": np.float16(2.5)}, {"guidance_scale": 2.5}),
        ({"guidance_scale": torch.tensor([2.5], requires_grad=True)}, {"guidance_scale": 2.5}),
        ({"guidance_scale": [Fraction(5, 2)]}, {"guidance_scale": 2.5}),
        ({"guidance_channels": np.int64(4)}, {"guidance_channels": 4}),
        ({"guidance_interval": torch.tensor([0.5, 2.0])}, {"guidance_interval": (0.5, 2.0)}),
        ({"sampler": np.str_("ddpm"), "steps": 2}, {"sampler": "ddpm"}),
        ({"seed": np.array(7)}, {}),
        ({"seeds": np.array([7], np.uint64)}, {}),
    ],
)
def test_numbers_of_every_type_are_plain_in_the_record(
    engine: Engine, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    usual = {"labels": [1], "steps": 2, "sampler": "ddim", "output": "latent", "seed": 3}
    if "seeds" in options:
        del usual["seed"]
    made = engine.generate(**(usual | options))
    for name, value in expected.items():
        assert made.settings[name] == value and type(made.settings[name]) in (
            int,
            float,
            tuple,
            str,
        )
    assert all(type(seed) is int for seed in made.seeds or [])
    json.dumps(call_record(made))


@pytest.mark.parametrize(
    "kind",
    [lambda t: t.numpy(), lambda t: t.double().numpy(), lambda t: t.tolist(), lambda t: t.double(),
     lambda t: t.numpy().astype(">f4"), lambda t: np.asfortranarray(t.numpy())],
)  # fmt: skip
def test_noise_is_taken_as_any_array(engine: Engine, kind: Any) -> None:
    usual = {"labels": [1], "steps": 2, "output": "latent"}
    expected = engine.generate(**usual, latents=Z, step_noise=NOISE)
    made = engine.generate(**usual, latents=kind(Z), step_noise=kind(NOISE))
    assert torch.equal(made.images, expected.images)
    assert made.settings == expected.settings  # the digests too


def test_the_last_seed_is_one_of_the_allowed(engine: Engine) -> None:
    last = 2**63 - 1
    assert engine.generate([1], steps=1, seed=last).seeds == [last]
    assert engine.generate([1, 2], steps=1, seed=last - 1).seeds == [last - 1, last]
    with pytest.raises(ValueError, match=f"^seed {last} counts up to {last + 1} for 2 labels; at"):
        engine.generate([1, 2], steps=1, seed=last)


@pytest.mark.parametrize("scale", [
    np.ma.masked_array([4.0, 2.0], [False, True]), np.ma.masked_array(4.0, True), np.ma.masked,
    [4.0, np.ma.masked],
])  # fmt: skip
def test_what_a_masked_array_hides_is_no_number(scale: object) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale .* is neither a number nor one number"):
        parse_scales(scale, 2)  # pyright: ignore[reportArgumentType]
    shown = np.ma.masked_array([4.0, 2.0], [False, False])
    assert parse_scales(shown, 2).tolist() == [4.0, 2.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0), ("num_heads", True), ("num_heads", 2.0), ("num_heads", "4"),
        ("vae_groups", -8), ("vae_groups", "8"), ("vae_groups", 8.0),
        ("vae_scaling_factor", 0.0), ("vae_scaling_factor", float("nan")),
        ("vae_scaling_factor", "1"), ("vae_shift_factor", float("inf")), ("vae_shift_factor", [1]),
        ("check_finite", "no"), ("check_finite", 1), ("vae", 3), ("vae", b"x"), ("vae", ""),
        ("numerics", 1), ("prediction", []), ("prediction", "velocity"),
    ],
)  # fmt: skip
def test_odd_loading_arguments_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} "):
        Engine.from_pretrained("builtin", device="cpu", **{name: value})


@pytest.mark.parametrize("source", [None, 3, b"x", "", ["builtin"]])
def test_odd_sources_are_named(source: object) -> None:
    with pytest.raises(ValueError, match=r"^model "):
        Engine.from_pretrained(source, device="cpu")


def test_numpys_numbers_are_taken_in_loading() -> None:
    engine = Engine.from_pretrained(
        "builtin", device="cpu", num_heads=np.int64(4), vae_groups=np.int64(8),
        vae_scaling_factor=np.float32(0.5), vae_shift_factor=np.float64(0.25),
    )  # fmt: skip
    assert engine.config.num_heads == 4
    assert engine.vae is not None
    config = engine.vae.config
    assert (config.norm_num_groups, config.scaling_factor, config.shift_factor) == (8, 0.5, 0.25)
