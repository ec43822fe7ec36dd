"""The lean forward against the reference model."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_reference, relative_error
from products import has_int8, require_int8
from tiny import tiny_dit, tiny_engine
from torch import Tensor

import dit_engine.backends.lean.backend as backend_module
import dit_engine.backends.lean.conditioning as conditioning_module
from dit_engine.backends import create_backend
from dit_engine.backends.lean.conditioning import GRAIN, ModulationTable
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_engine.sampling.samplers import SAMPLERS
from dit_kernels import quantized
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product

CPU = torch.device("cpu")
WIDTHS = {384: 6, 1152: 16}  # the narrowest and the widest published model: heads of 64 and of 72


def inputs(model: DiT) -> tuple[Tensor, Tensor, Tensor]:
    side = model.config.input_size
    x = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999, 400, 0]), torch.tensor([1, model.config.null_class, 1])


def run(backend: str, model: DiT, precision: str) -> Tensor:
    x, timesteps, labels = inputs(model)
    denoise = create_backend(backend, model, precision, CPU).prepare(labels, timesteps)
    with torch.inference_mode():
        return torch.stack([denoise(x, k) for k in range(len(timesteps))])


def exact(model: DiT) -> Tensor:
    """float64, from float32 embeddings of t as everywhere."""
    x, timesteps, labels = inputs(model)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return torch.stack([wide(x.double(), t.expand(3), labels) for t in timesteps])


@pytest.fixture(params=["own products", "library's products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that the CPU's matrix products go; which one is taken depends on the machine."""
    if request.param == "library's products":
        monkeypatch.setattr(native_product, "why_not", lambda dtype: "not here")
    elif (reason := native_product.why_not(torch.float32)) is not None:
        pytest.skip(reason)


SHAPES: list[dict[str, object]] = [
    *({"hidden_size": d, "num_heads": heads, "input_size": 12} for d, heads in WIDTHS.items()),
    {"learn_sigma": False},
    {"patch_size": 4},
    {"num_heads": 4, "hidden_size": 48},  # head dimension 12: no kernel has it
    {"depth": 1},
    {"numerics": "diffusers", "mlp_norm_eps": 1e-2},  # the other norms keep 1e-6
]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_eager(shape: dict[str, object]) -> None:
    model = tiny_dit(**shape)
    assert relative_error(run("lean", model, "fp32"), run("eager", model, "fp32")) < 1e-5


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("width", WIDTHS)
def test_bfloat16_is_at_most_twice_as_far_off_as_eager(width: int) -> None:
    model = tiny_dit(hidden_size=width, num_heads=WIDTHS[width], input_size=12)
    eager = run("eager", model, "bf16")
    assert_close_to_reference(run("lean", model, "bf16"), exact(model), same_dtype=eager)


@pytest.mark.usefixtures("products")
def test_int8_error_is_that_of_seven_bits() -> None:
    require_int8()
    model = tiny_dit(hidden_size=384, num_heads=6, depth=4)
    error = relative_error(run("lean", model, "int8"), exact(model))
    # A step of 1/127 of a row's maximum, over four blocks of random weights; a wrong scale, zero
    # point or channel would give an error near 1.
    assert 1e-3 < error < 0.05


@pytest.mark.filterwarnings("ignore:.*native kernels")
def test_fp8_error_is_that_of_three_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the references compute it; a GPU calls its kernels in the same way."""
    monkeypatch.setattr(native, "why_not", lambda: "not here")
    for module in (quantized, backend_module):
        monkeypatch.setattr(module, "quantized_why_not", lambda *_: None)
    model = tiny_dit()
    error = relative_error(run("lean", model, "fp8"), exact(model))
    # Without its GELU, or with two, it would be 0.035 or 0.015.
    assert 0.004 < error < 0.011


def test_the_model_is_left_as_it_is() -> None:
    model = tiny_dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for precision in ("fp32", "bf16", *(["int8"] if has_int8() else [])):
        run("lean", model, precision)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_table_of_few_steps_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    whole = run("lean", model, "fp32")
    monkeypatch.setattr(conditioning_module, "TABLE_BYTES", 1)
    assert torch.equal(run("lean", model, "fp32"), whole)


@torch.inference_mode()
def test_tables_hold_several_steps_within_their_bound_and_no_other_label_changes_a_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with a product whose results depend on its number of rows, as some libraries' do."""
    conditioning = create_backend("lean", tiny_dit(), "fp32", CPU).conditioning

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + 1e-3 * x.numel()

    monkeypatch.setattr(conditioning_module, "F", SimpleNamespace(linear=linear, silu=F.silu))
    steps = torch.arange(999, 979, -1)

    def table(*labels: int) -> ModulationTable:
        return ModulationTable(conditioning, torch.tensor(labels), steps, by_label=True)

    alone, among, short = table(3), table(1, 3, 5, 3), table(3)
    assert alone.chunk == among.chunk == len(steps) - len(steps) % GRAIN
    short.chunk = GRAIN
    for k in range(len(steps)):
        row = alone.step(k, 1)
        assert torch.equal(among.step(k, 4)[[1, 3]], row.expand(2, -1))
        assert torch.equal(short.step(k, 1), row)
    # DiT-XL/2, eight labels and the null one, 250 steps: 0.75 MiB a row.
    conditioning.width = 28 * 6 * 1152 + 2 * 1152
    many = ModulationTable(conditioning, torch.arange(9), torch.arange(250), by_label=True)
    assert many.chunk * 9 * conditioning.width * 4 <= conditioning_module.TABLE_BYTES


# Any strides.
GIVEN = {
    "latents": torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last),
    "step_noise": torch.randn(5, 2, 4, 8, 8).transpose(-1, -2),
}


@pytest.mark.parametrize(
    "options",
    [
        *({"sampler": name, "guidance_scale": [1.0, 4.0]} for name in SAMPLERS),
        {"guidance_interval": (0.5, 10.0)},
        {"guidance_scale": 1.0},
        {"guidance_channels": None},
        {"noise": "official"},
        GIVEN,
    ],
    ids=lambda options: ",".join(options),
)
def test_generate_equals_eager(options: dict[str, object]) -> None:
    engine = tiny_engine()
    common = {"labels": [1, 2], "steps": 5, "seed": 4, "output": "latent"} | options
    eager = engine.generate(backend="eager", **common).images
    assert relative_error(engine.generate(backend="lean", **common).images, eager) < 1e-5


def test_precisions_that_a_backend_or_device_has_not() -> None:
    model = tiny_dit()
    with pytest.raises(BackendUnavailable, match=r"^precision 'int8' is for backend 'lean'"):
        create_backend("eager", model, "int8", CPU)
    with pytest.raises(BackendUnavailable, match=r"^precision 'fp8': fp8 products are for CUDA"):
        create_backend("lean", model, "fp8", CPU)


def test_without_native_kernels_a_warning_says_so_and_the_numbers_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_dit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with them there is nothing to say
        if native.available():
            run("lean", model, "fp32")
    monkeypatch.setattr(native, "why_not", lambda: "there is no cmake")
    with pytest.warns(UserWarning, match=r"without its native kernels, .*: there is no cmake$"):
        found = run("lean", model, "fp32")
    assert relative_error(found, run("eager", model, "fp32")) < 1e-5
