"""The lean forward on the CPU as a recording of its native calls, in buffers that are kept.

It does on the CPU what `dit_engine.backends.lean.cuda_graphs` does on CUDA, for forwards whose
every operator between the patches and the final layer is a call of the native library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.backends.lean.forward import Activations, LeanTransformer
from dit_kernels.cpu.recording import Recording, record


class RecordedForwards:
    """Forwards of up to ``rows`` rows in one set of buffers, recorded for each number of rows.

    Beside the modulations, the buffers hold 7·M·T·D numbers, and 5·M·T·D bytes of codes where the
    forward is quantised. For one thread at a time.
    """

    def __init__(self, transformer: LeanTransformer, rows: int) -> None:
        self.transformer = transformer
        config, dtype = transformer.config, transformer.dtype
        d, wide = config.hidden_size, max(3 * config.hidden_size, config.mlp_hidden_size)
        tokens = rows * config.num_tokens
        self._narrow = torch.empty(3, rows, config.num_tokens, d, dtype=dtype)
        self._wide = torch.empty(tokens * wide, dtype=dtype)
        self._modulation = torch.empty(rows, (6 * config.depth + 2) * d, dtype=dtype)
        self._codes = self._scales = torch.empty(0)
        if transformer.quantized:
            self._codes = torch.empty(tokens * (d + config.mlp_hidden_size), dtype=torch.uint8)
            self._scales = torch.empty(2, rows, config.num_tokens, dtype=torch.float32)
        self._recordings: dict[int, Recording] = {}

    def __call__(self, x: Tensor, table: ModulationTable, step: int, rows: int) -> Tensor:
        """Latents x (M or a half of M, C, S, S) → the final layer's tokens (M, T, p·p·C_out), M
        being ``rows``. Where x holds half as many, both halves start from it."""
        transformer = self.transformer
        tokens, narrow, attended = self._narrow[:, :rows]
        modulation = table.step(step, rows, out=self._modulation[:rows])
        for half in tokens.split(max(len(x), 1)):
            transformer.embed(x, half)
        recording = self._recordings.get(rows)
        if recording is not None:
            recording.replay()
            return transformer.final(narrow)
        memory = self._activations(rows, narrow, attended)
        with record() as recording:
            transformer.trunk(tokens, modulation, memory)
        self._recordings[rows] = recording
        return transformer.final(narrow)

    def _activations(self, rows: int, narrow: Tensor, attended: Tensor) -> Activations:
        config = self.transformer.config
        shape = (rows, config.num_tokens)
        d, hidden = config.hidden_size, config.mlp_hidden_size
        count = rows * config.num_tokens
        made = Activations(
            narrow,
            attended,
            self._wide[: count * 3 * d].view(*shape, 3 * d),
            self._wide[: count * hidden].view(*shape, hidden),
        )
        if self.transformer.quantized:
            codes, hidden_codes = self._codes[: count * (d + hidden)].split(
                [count * d, count * hidden]
            )
            made.codes = codes.view(*shape, d), self._scales[0, :rows]
            made.hidden_codes = hidden_codes.view(*shape, hidden), self._scales[1, :rows]
        return made
