"""Images of labels, from seeds 0, 1, …: python client.py localhost:8000 images.png 50 planets 3"""

import sys


def main(url: str, output: str, steps: str, *labels: str) -> None:
    import numpy as np
    import tritonclient.http as triton  # pip install 'tritonclient[http]' pillow
    from PIL import Image

    n, kinds = len(labels), {"label_names": "BYTES", "seeds": "INT64", "steps": "INT64"}
    columns = np.array(labels, dtype=object), np.arange(n), np.full(n, int(steps))
    inputs = [triton.InferInput(name, [n, 1], kind) for name, kind in kinds.items()]
    sent = [i.set_data_from_numpy(c[:, None]) for i, c in zip(inputs, columns, strict=True)]
    answer = triton.InferenceServerClient(url, network_timeout=3600).infer("dit", sent)
    Image.fromarray(np.concatenate(np.asarray(answer.as_numpy("images")), axis=1)).save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
