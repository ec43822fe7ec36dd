"""The README.md of a model repository."""

from __future__ import annotations

import shlex

from dit_engine.io.printable import markdown_text, printable
from dit_export.bundle import Bundle
from dit_export.server.configuration import ServingOptions
from dit_export.source import model_name

_TEXT = """\
# {model} on Triton Inference Server

| model | does | inputs → outputs |
|---|---|---|
| `dit` | whole images | see below → `images` (N, {pixels}, {pixels}, 3) uint8 |
| `dit_guided_step` | one guided step of any sampler | see its config.pbtxt |
| `dit_transformer` | the transformer alone | `x`, `t`, `y` → `output` |
| `vae_decoder` | latents to images | `z` → `images` (N, 3, {pixels}, {pixels}), about −1 to 1 |

The graphs are {platform}, {dtype}; guidance acts on {guided} latent channels.
A request may have at most {batch} images. Inputs with one number per image, such as `t`, have the
shape (N, 1).

Inputs of `dit`, each (N, 1) with one row per image:

| input | type | |
|---|---|---|
| `labels` | INT64 | class numbers 0 to {last}; alternatively: |
| `label_names` | BYTES | {names} |
| `seeds` | INT64 | 0 or above; an image depends only on its own row |
| `steps` | INT64 | optional, 1 to {train_steps}; the sampler's usual number by default |
| `guidance_scale` | FP32 | optional, 4.0 by default; 1 is no guidance |
| `sampler` | BYTES | optional: ddpm (the default), ddim, dpm++ |

With the same seeds the images are those of `Engine.generate`, within the precision of {dtype}.
Requests that wait at the same time share batches, also with different samplers and numbers of
steps; all of them are answered when the longest one is done.

An invalid request (an unknown label, steps 0) gets one line that names the value and what is
allowed, as 400 over HTTP or INVALID_ARGUMENT over gRPC. 500 or INTERNAL is an error in the server,
or means that the images are not finite, as with a huge `guidance_scale`.

## Start a server

In a container, from this directory{gpu}:

```
KEY=$(openssl rand -hex 32)
docker run --rm --gpus all --shm-size 1g -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 \\
    -p 127.0.0.1:8002:8002 -e DIT_SERVER_FORWARDS=1 \\
    -v "$PWD":/models:ro nvcr.io/nvidia/tritonserver:<yy.mm>-py3 \\
    tritonserver --model-repository=/models --disable-auto-complete-config \\
    --http-restricted-api=shared-memory,model-repository,trace,logging:key=$KEY \\
    --grpc-restricted-protocol=shared-memory,model-repository,trace,logging:key=$KEY \\
    --http-header-forward-pattern='(?i)(host|origin)' \\
    --grpc-header-forward-pattern='(?i)user-agent'
```

Take release 26.07 or later: NVIDIA's security bulletins list vulnerabilities of all earlier ones,
such as requests that end the server (CVE-2025-23310), keep it busy (CVE-2026-16497) or run code in
it (CVE-2025-23319).
The options close endpoints that no client needs, and let `dit` refuse requests from web pages and
all requests to /generate; `dit` has inputs with names of headers for this, which no client sets. A
page can still have the other models run. A server that is addressed by a name needs
`-e DIT_SERVER_NAMES=<name>`. Anyone who can reach the
ports can ask for images.

{needs}

Without a container, to try things out: `dit-export triton --serve .` takes the `tritonserver` on
PATH. The option `--server` takes the one of a virtual environment, which is made with

```
python -m venv .venv-server
.venv-server/bin/pip install --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4 \\
    onnxruntime flatbuffers packaging protobuf
dit-export triton --serve . --server .venv-server
```

(Linux, x86-64, Python 3.10 to 3.12). That server runs the graphs on the CPU. It is Triton 2.51,
which anyone who can reach it can end with one request (CVE-2025-23310), so use it only on your own
machine.

`--serve` refuses a repository with other code than its version of DiT Engine writes. A server that
you start yourself, and `client.py`, run the code that is here. If the repository comes from people
whom you do not know, read `client.py`, `dit/1` and every `config.pbtxt` first, or write the
repository again from the export.

## Ask it

```
pip install 'tritonclient[http]' pillow
python client.py localhost:8000 images.png 50 {example}     # 50 steps, seeds 0, 1, …
```

`Engine.generate(..., backend="triton://localhost:8000", precision="{precision}")` runs the
sampling loop in your process and the transformer on the server; `triton://grpc+localhost:8001` does
the same over gRPC.

State: `curl localhost:8000/v2/health/ready`, `localhost:8000/v2/models/dit/stats`, and
`localhost:8002/metrics`.

## Your own sampling loop

`dit_guided_step` takes the latents `z`, the `x0` from the step before (zeros at first) and
`noise`, each (N, {channels}, {side}, {side}); `t`, `y` and `guidance_scale`; and `coefficients`
(N, 9), which define the sampler:

| number | name | what it does |
|---|---|---|
| 0, 1 | a, b | `x0` = a·`z` + b·ε, where ε is the guided prediction |
| 2 to 5 | c1 to c4 | mean = c1·`x0` + c2·`z` + c3·ε + c4·`x0_before` |
| 6, 7 | low, high | logarithms of the variance, between which the model's v in [−1, 1] chooses |
| 8 | s | `z_next` = mean + s·exp((low + (v + 1)/2·(high − low)) / 2)·`noise` |

If s = 0, as in every sampler's last step, `noise` has no effect. {variance} The rows of a
schedule are `step_coefficients("ddpm", make_schedule({schedule}), learned={learned})` of
`dit_engine.sampling.coefficients` and `dit_engine.sampling.schedule`, which need only numpy;
copies are in `dit/1`.
{diffusion}`vae_decoder` makes the images from the last `z_next`.
"""


def readme(bundle: Bundle, options: ServingOptions) -> str:
    config, vae, names = bundle.config, bundle.vae, bundle.label_names
    assert vae is not None
    onnx = options.platform == "onnxruntime"
    changed = ", ".join(f"{key} {value}" for key, value in config.diffusion.record().items())
    return _TEXT.format(
        model=model_name(config),
        pixels=config.input_size * vae.downsampling,
        platform="ONNX" if onnx else "TensorRT engines",
        dtype=bundle.dtype,
        precision=bundle.dtype,
        guided=f"the first {bundle.guided_channels} of {config.in_channels}",
        channels=config.in_channels,
        side=config.input_size,
        learned=config.learn_sigma,
        schedule='50, "official"' + (", diffusion" if changed else ""),
        diffusion=_DIFFUSION.format(changed=changed) if changed else "",
        variance=_LEARNED if config.learn_sigma else _FIXED,
        batch=options.max_batch_size,
        last=config.num_classes - 1,
        train_steps=config.diffusion.num_train_steps,
        names="this model has none" if names is None else _some(names),
        gpu=" (without a GPU, leave out `--gpus all`)" if onnx else "",
        needs=_ONNX_NEEDS.format(opset=bundle.opset) if onnx else _PLAN_NEEDS,
        example=" ".join(["0", "1"] if names is None else map(_argument, range(2), names)),
    )


_DIFFUSION = """\
`diffusion` is `Diffusion.from_dict` (`dit_engine.sampling.diffusion`) of the entry "diffusion" in
`dit/1/pipeline.json`: this model has {changed}. ε above is what it predicts, and where it has a
`clip`, what `clipping` gives says how much of the clamped `x0` is added to `z_next` afterwards.
"""
_LEARNED = "This model learns its variance."
_FIXED = "This model learns no variance: only s·`noise` is added."
_ONNX_NEEDS = """\
The graphs are of ONNX opset {opset}: the release's onnxruntime must know it (1.23 knows 23; the
release notes name the version). 1.24 and earlier compute 23's Attention on the CPU, also where
there is a GPU. `dit-export triton --opset 22` writes graphs without it."""
_PLAN_NEEDS = """\
Engines load only in the TensorRT version that built them: take the release whose notes name it."""


def _some(names: tuple[str, ...]) -> str:
    first = ", ".join(markdown_text(name.split(",")[0]) for name in names[:4])
    return first + (f" … ({len(names)} in all)" if len(names) > 4 else "")


def _argument(number: int, name: str) -> str:
    """A label as an argument in a shell command: quoted, or its number where a name could end the
    block of code or be taken for an option."""
    plain = name == printable(name) and name.strip() and "`" not in name and name[0] != "-"
    return shlex.quote(name) if plain else str(number)
