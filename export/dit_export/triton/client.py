"""Images from the server of this repository: python client.py planets 3 -o planets.png

Needs: pip install tritonclient[http] pillow
"""

import argparse


def main() -> None:
    import numpy as np
    import tritonclient.http as triton
    from PIL import Image

    parser = argparse.ArgumentParser(description="Ask a Triton Inference Server for images.")
    parser.add_argument("labels", nargs="+", help="class names or numbers, one image each")
    parser.add_argument("-o", "--output", default="images.png")
    parser.add_argument("--url", default="localhost:8000", help="of the server's HTTP port")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="image i is made from seed + i")
    asked = parser.parse_args()

    n = len(asked.labels)
    columns = {
        "label_names": np.array([[name.encode()] for name in asked.labels], dtype=object),
        "seeds": asked.seed + np.arange(n, dtype=np.int64)[:, None],
        "steps": np.full((n, 1), asked.steps, dtype=np.int64),
    }
    inputs = []
    for name, column in columns.items():
        kind = "BYTES" if column.dtype == object else "INT64"
        inputs.append(triton.InferInput(name, column.shape, kind))
        inputs[-1].set_data_from_numpy(column)
    client = triton.InferenceServerClient(asked.url, network_timeout=3600, connection_timeout=10)
    images = np.asarray(client.infer("dit", inputs).as_numpy("images"))  # (N, H, W, 3) uint8
    Image.fromarray(np.concatenate(list(images), axis=1)).save(asked.output)
    print(f"{n} of {images.shape[1]}×{images.shape[2]} pixels → {asked.output}")


if __name__ == "__main__":
    main()
