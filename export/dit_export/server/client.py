"""Get images of labels, seeds 0, 1, …: python client.py localhost:8000 images.png 50 planets 3"""

import sys


def main(url: str, output: str, steps: str, *labels: str) -> None:
    if not steps.isdecimal():
        raise ValueError(f"steps {steps!r} is not a whole number")
    import numpy as np
    import tritonclient.http as triton  # pip install 'tritonclient[http]' pillow
    from PIL import Image

    n, kinds = len(labels), {"label_names": "BYTES", "seeds": "INT64", "steps": "INT64"}
    columns = np.array(labels, dtype=object), np.arange(n), np.full(n, int(steps))
    inputs = [triton.InferInput(name, [n, 1], kind) for name, kind in kinds.items()]
    sent = [i.set_data_from_numpy(c[:, None]) for i, c in zip(inputs, columns, strict=True)]
    client = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=3600)
    try:
        answer = client.infer("dit", sent)
    except OSError as error:
        raise OSError(f"no server answers at {url}: {error}") from None
    Image.fromarray(np.concatenate(np.asarray(answer.as_numpy("images")), axis=1)).save(output)


if __name__ == "__main__":
    try:
        if len(sys.argv) < 5:
            raise ValueError(f"four or more arguments are needed. {__doc__}")
        main(*sys.argv[1:])
    except Exception as error:  # the message may have the server's text, so it is escaped
        told = " ".join(f"error: {error} ({' '.join(sys.argv)})".split())
        print(*(c if c.isprintable() else ascii(c)[1:-1] for c in told), sep="", file=sys.stderr)
        sys.exit(2)
