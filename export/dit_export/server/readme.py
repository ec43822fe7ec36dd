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

The graphs are {platform}, {dtype}; guidance acts on {guided} latent channels. A request may ask for
at most {batch} images. Inputs with one number per image have the shape (N, 1).

| input of `dit` | type | |
|---|---|---|
| `labels` | INT64 | class numbers 0 to {last}; or give |
| `label_names` | BYTES | {names} |
| `seeds` | INT64 | 0 or more; an image depends only on its own row |
| `steps` | INT64 | optional, 1 to {train_steps}; the sampler's usual number by default |
| `guidance_scale` | FP32 | optional, 4.0 by default; 1 is no guidance |
| `sampler` | BYTES | optional: ddpm (the default), ddim, dpm++ |

With the same seeds the images are those of `Engine.generate`, within the precision of {dtype}.
Requests that wait at the same time share batches, whatever their samplers and numbers of steps;
they are all answered when the longest one is done. A client's mistake is answered with 400 (over
gRPC INVALID_ARGUMENT) and one line that names the value and what is allowed. 500 (INTERNAL) is an
error in the server, or says that the images are not finite.

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

Take release 26.07 or later: with earlier ones a request can end the server (CVE-2025-23310) or run
code in it (CVE-2025-23319). {needs}

The options close endpoints that no client needs, and let `dit` refuse requests from web pages and
all requests to /generate. A page can still have the other models run. If clients address the server
by a name, add `-e DIT_SERVER_NAMES=<name>`. Whoever can reach the ports can ask for images.

`dit-export triton --serve .` starts a server on your own machine without a container. It takes the
`tritonserver` on PATH, or the one that `--server` names, and refuses a repository with other code
than its version of DiT Engine writes. A server that you start yourself, and `client.py`, run the
code that is here: if you do not trust its source, read `client.py`, `dit/1` and every
`config.pbtxt` first, or write the repository again from the export.

## Ask it

```
pip install 'tritonclient[http]' pillow
python client.py localhost:8000 images.png 50 {example}     # 50 steps, seeds 0, 1, …
```

`Engine.generate(..., backend="triton://localhost:8000", precision="{dtype}")` runs the sampling
loop in your process and the transformer on the server; `triton://grpc+localhost:8001` uses gRPC.
State and metrics: `localhost:8000/v2/health/ready`, `localhost:8000/v2/models/dit/stats`,
`localhost:8002/metrics`.

docs/serving.md of DiT Engine says how to install a `tritonserver` in a virtual environment, and how
to write a sampling loop of your own around `dit_guided_step`.
"""
_ONNX_NEEDS = """\
Its onnxruntime must know ONNX opset {opset} (1.23 knows 23; the release notes name the version).
Up to 1.24 it computes opset 23's Attention on the CPU even if there is a GPU:
`dit-export triton --opset 22` writes graphs without it."""
_PLAN_NEEDS = """\
Engines load only in the TensorRT version that built them: take the release whose notes name it."""


def readme(bundle: Bundle, options: ServingOptions) -> str:
    config, vae, names = bundle.config, bundle.vae, bundle.label_names
    assert vae is not None
    onnx = options.platform == "onnxruntime"
    return _TEXT.format(
        model=model_name(config),
        pixels=config.input_size * vae.downsampling,
        platform="ONNX" if onnx else "TensorRT engines",
        dtype=bundle.dtype,
        guided=f"the first {bundle.guided_channels} of {config.in_channels}",
        batch=options.max_batch_size,
        last=config.num_classes - 1,
        train_steps=config.diffusion.num_train_steps,
        names="this model has none" if names is None else _some(names),
        gpu=" (without a GPU, leave out `--gpus all`)" if onnx else "",
        needs=_ONNX_NEEDS.format(opset=bundle.opset) if onnx else _PLAN_NEEDS,
        example=" ".join(["0", "1"] if names is None else map(_argument, range(2), names)),
    )


def _some(names: tuple[str, ...]) -> str:
    first = ", ".join(markdown_text(name.split(",")[0]) for name in names[:4])
    return first + (f" … ({len(names)} in all)" if len(names) > 4 else "")


def _argument(number: int, name: str) -> str:
    """A label as an argument in a shell command: quoted, or as its number if its name could end the
    block of code or be taken for an option."""
    plain = name == printable(name) and name.strip() and "`" not in name and name[0] != "-"
    return shlex.quote(name) if plain else str(number)
