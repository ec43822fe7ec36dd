"""Planted faults: do the tests find them?

    make faults                     # all, in about an hour on two cores
    python tests/faults.py EMA      # those whose name holds "EMA"

Each fault is one small change of the code, of the kind that a slip makes. In a checkout without
changes this program plants one at a time, runs the test file that should find it, then, if that
does not, its whole folder, and takes the fault out again. A fault that no test finds is printed
as SURVIVED, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("dit_engine", "kernels", "export", "benchmarks")
BUILT, LIBRARY = "build/faults", "kernels/dit_kernels/cpu/libdit_kernels_cpu.so"

# Test file that should find them → name → the line of code, «what it says → the fault».
# fmt: off
FAULTS = {
    "engine/test_sampler": {
        "posterior mean from the wrong ᾱ":
            "self.betas * np.sqrt(«self.alphas_cumprod_prev → self.alphas_cumprod») /",
        "posterior mean without the root": "one_minus_prev * «np.sqrt → »(1.0 - self.betas) /",
        "bounds of the variance swapped":
            "fraction * «max_log[k] + (1 - fraction) * min_log[k] → "
            "min_log[k] + (1 - fraction) * max_log[k]»",
        "ddim noise at the last step": "if eta > 0« and k < len(schedule) - 1 → »:",
        "solver's ratio inverted": "float(0.5 «/ → *» ratio)"},
    "engine/test_schedule": {
        "official spacing truncated": "timesteps.append(«round → int»(position))",
        "trailing spacing truncated": "points(steps)«.round().astype → .astype»(np.int64) - 1"},
    "checkpoint/test_scheduler_config": {
        "steps_offset dropped": "dtype=np.int64)[::-1] * stride« + offset → »",
        "end of ddim": "end = «table[0] if self.diffusion.end_at_first else  → »1.0",
        "ddim stride, off by one": "np.where(t <« → =» 0, end, table[t])",
        "least signal of the solver": "SOLVER_LEAST_SIGNAL = 2.0**-«24 → 20»"},
    "engine/test_fused_sampling": {
        "v prediction, sign of x0": "pair = np.sqrt(now), «- → »np.sqrt(1.0 - now)",
        "sample prediction, sign of epsilon": "«- → »np.sqrt(now / (1.0 - now))",
        "epsilon's share of z lost": "rows[:, 3] «+ → »= rows[:, 4] * of_z",
        "dpm++ clamps": 'if clip is None« or name == "dpm++" → »:',
        "noise at the last step": "rows[-1, 8] «= 0.0 → *= 1.0»",
        "second order a step late": "(lambdas[k] - lambdas[k - 1]) if k > «0 → 1» else 0.0",
        "ddim direction without the noise's share": "np.sqrt(1 - before« - sigmas**2 → »)",
        "deviation not halved": "np.exp(«0.5 *  → »fixed)"},
    "engine/test_guidance": {
        "interval turned round": "guides is not None and «not  → »guides[k]",
        "interval's open end": "(sigmas >« low) & (sigmas <= → = low) & (sigmas <» high)",
        "scale 1 still guided": "«combined = torch.where(unguided, eps, combined) → pass»",
        "variance of the unconditional half":
            "torch.cat([combined, «cond → uncond»[:, guided_channels:]], dim=1)"},
    "engine/test_engine": {
        "given latents shift the draws":
            "drawn = self.otherwise.start()« →  if self.latents is None else self.latents»",
        "official noise of the other half": "return self._draw(self.batch)[«: self.n → -self.n :»]",
        "official noise skips no draws": "for _ in range(«self.drawn → step», step):",
        "scales of another part of the batch": "scales[«part → :count»]",
        "seeds of another part of the batch": "seeds=self.seeds[«part → :count»]",
        "step noise of another part": "step_noise[:, «part → :count»]",
        "latents of another part": "self.latents[«part → :count»]",
        "null class is class 0": "[«plan.config.null_class → 0»] * len(plan)",
        "pixels rounded otherwise": "127.5 * images + «128.0 → 127.5»",
        "smaller batch forgets its images":
            "limit« = count // 2 → , first = count // 2, first + 1»"},
    "engine/test_noise": {"upload over a buffer in use": "«copied.synchronize() → pass»"},
    "engine/test_not_finite": {
        "overflow becomes a picture":
            "return «torch.where(x0.abs() < LARGEST, x0.clamp(-clip, clip), torch.nan) → "
            "x0.clamp(-clip, clip)»",
        "latents are not checked":
            "«check_latents(z, again, len(plan.schedule), part.names) → pass»"},
    "engine/test_lean": {
        "stale table of modulations": "if «first != self._first → self._first < 0»:\n",
        "bits depend on the table's size":
            "self.chunk = max(«GRAIN, self.chunk - self.chunk % GRAIN → 3, self.chunk»)",
        "labels in one product": "if « → not »by_label:\n            starts",
        "shift and scale swapped":
            "«shift, scale → "
            "scale, shift» = vectors[6 * i + 6 : 6 * i + 8]\n            norm = norms.next",
        "wrong epsilon before the MLP":
            "(gate_msa, shift_mlp, scale_mlp, «eps → NORM_EPS»), norms.next"},
    "engine/test_lean_vae": {
        "upsampling taps swapped":
            "SUMS = ((0, 0, 1), («0, 1, 1), (1, 1, 0 → 1, 1, 0), (0, 1, 1»), (1, 0, 0))",
        "bias added for each part": "            «bias = None → pass»\n",
        "norm written over the skip":
            "«skip, y = self.shortcut(x), self.norm1(x, over=True) → "
            "y, skip = self.norm1(x, over=True), self.shortcut(x)»",
        "constant lost in a residual block": "self.shift = «shift +  → »self.shift",
        "constant lost in a shortcut":
            "bias = bias.to(shift)« + (weight.to(shift) * shift).sum(1) → »",
        "constant lost before an upsampling": "x = self.add(x, add, self.before« → * 0»)"},
    "engine/test_vae_graphs": {
        "cuDNN's switch stays on": "finally:\n        cudnn.benchmark = «before → True»",
        "shape captured at once": "if «again and  → »key not in self._refused",
        "pixels of the graph": "pixels.copy_(«self.pixels → self.pixels * 0»)"},
    "engine/test_recorded": {
        "replay reads old modulations": "table.step(step, rows«, out=self._modulation[:rows] → »)",
        "replay of another number of rows":
            "«self._recordings.get(rows → next(iter(self._recordings.values()), None»)"},
    "engine/test_copies": {"a copy needs a VAE": "if «module is not None and  → »any(p.is_inf"},
    "engine/test_cuda_graphs": {
        "graphs share a workspace": "with «_own_workspaces(),  → »into:",
        "graph keeps old noise": "«, (self.noise, noise) → »):",
        "counter is never set again": "if «known is None or number != known[i] → known is None»:",
        "graph's own memory given away": "return «z.clone() → z»",
        "graph of two users": "graph.taken = «alone → False»",
        "latents copied onto themselves": "if given is not None« and given is not own → »:"},
    "kernels/test_linear": {"signed codes taken as unsigned":
        "codes.view(torch.uint8)« ^ 0x80 → »"},
    "kernels/test_operators": {
        "gradients dropped": "return «torch.is_grad_enabled() → False» and any(",
        "autocast changes a kernel's dtype":
            'if «not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")) → '
            "True»:",
        "strided modulation accepted":
            "if «tensor.stride(-1) != 1 and tensor.shape[-1] != 1 → False»:",
        "odd head dimension accepted": "if d «% 8 or d  → »> HEAD_DIM_LIMIT:"},
    "kernels/test_triton_operators": {
        "columns behind the row in the variance":
            "centered = «tl.where(tl.arange(0, BLOCK) < D, centered, 0.0) → centered»",
        "one part of a product's sums left out": "tl.static_range(«1 → 2», SPLITS)",
        "rows of the last program left out": "kernel, «-(-total // rows) → total // rows», *t",
        "group norm counts what is not there":
            "centered = «tl.where(mask, centered, 0.0) → centered»",
        "group norm's second tile weighs too much": "count = «tile → 0 * tile» * (ROWS * 1.0)",
        "group norm without the shift's factor": "center -= «tl.load(shift → 0 * tl.load(shift»"},
    "kernels/test_chooser": {
        "a candidate's NaN passes": "if «not error <= allowed → error > allowed»:",
        "a wrong row among many passes": "norms.maximum(usual)).«max → mean»().item()",
        "a tie changes the default": "known[best] <= «(1 - ADVANTAGE) * usual → usual»",
        "other candidates' times taken": "(times is None or «list(times) != names → False»)"},
    "kernels/test_triton_choices": {
        "split sums without the bias": "out=out, bias=«layer.bias → 0 * layer.bias»)[1]",
        "no GELU in the chosen product": 'gelu=«part == "fc1" → False»)',
        "shift taken for the gate": "«gate, shift → shift, gate», scale, eps = vectors"},
    "engine/test_choice_file": {
        "another driver's times taken": 'if «held["facts"].get(name) != value → False»:',
        "another process's times lost": "self._times = «self._read() |  → »self._times"},
    "kernels/test_native_operators": {
        "native norm's epsilon": "variance + «a.eps → 1e-6f»",
        "native norm keeps the first image's modulation": "if («row / a.t != image → image < 0») {",
        "NaN noise times zero": "«deviation == 0 ? mean :  → »mean + deviation * noise",
        "one channel too many guided": "channel <« → =» a.guided_channels",
        "int8 scale to 128": "greatest) / «127.0f → 128.0f»"},
    "kernels/test_native_product": {
        "odd end of K dropped": "«left < Steps::depth ? shape.odd_bytes :  → »0",
        "column offsets of the first columns": "call.col_offset« + column → », part)"},
    "checkpoint/test_diffusers": {
        "keys and values swapped":
            '"attn1.to_q", "«attn1.to_k", "attn1.to_v → attn1.to_v", "attn1.to_k»"',
        "embedders that differ accepted": "if « → False and »not _same_bits("},
    "checkpoint/test_checkpoint": {"diffusers' epsilon": "DIFFUSERS_NORM_EPS = 1e-«5 → 6»"},
    "checkpoint/test_wrappers": {"decoder's levels not turned round": "«last -  → »int(match[1])"},
    "security/test_pickles": {
        "tensors larger than the file accepted": "if «self.stored > self.file_bytes → False»:",
        "archive with a name twice accepted": "if «times > 1 → False»:",
        "pickle may ask for any torch function":
            'if «function.startswith("torch.") and function not in _TORCH → False»:'},
    "security/test_writing": {"private directory open to all":
        'folder.mkdir(«0o700 if os.name == "posix" else 0o777 → 0o777»)'},
    "security/test_json": {"deep JSON accepted": "if «depth > DEPTH → False»:"},
    "engine/test_labels": {
        "label one too high accepted": "if not 0 <= number <« → =» num_classes:",
        "name of two classes accepted": "if «len(classes) > 1 → False»:"},
    "training/test_loss": {"loss: mean of the wrong step":
        "torch.where(t.view(-1, 1, 1, 1) == «0 → 1», nll, kl)"},
    "training/test_loop": {
        "EMA the wrong way round": "«1.0 -  → »decay)",
        "EMA not restored": '«average.copy_(state["ema"][name]) → pass»'},
    "bench/test_metrics": {
        "covariance divided by N": "scatter / «max(count - 1, 1) → count»",
        "a vector is its own neighbour": "topk(min(k« + 1 → », both.shape[1])"},
    "bench/test_compare": {"--compare without its noise bound":
        "if «low > old_high and  → »ratio > 1 + LEAST:"},
    "bench/test_timing": {
        "every round has the same order": "    «shuffle(order) → pass»\n",
        "references in TF32": "switch.allow_tf32 = «False → True»",
        "the caches hold what a sample must write back": "scratch.«sum → zero_»()"},
    "bench/test_gpu_bench": {
        "a lost device goes unnoticed": "if «not usable(timer.device) → False»:",
        "other images than asked for are the same": "«worst <= bound → True» else \"wrong\"",
        "tests of a GPU that fail": "if told[1] in («\"FAILED\", \"ERROR\" → \"NEVER\",»):"},
    "bench/test_prediction": {
        "tiles that are not whole": "return «math.ceil(tiles / PROCESSORS) → tiles / PROCESSORS»",
        "residual read for nothing": "made, moved=made.moved« + x → » + vector)"},
    "engine/test_gpus": {
        "an index that torch misreads": "    if «str(parsed) != str(device) → False»:  # torch",
        "bfloat16 on every GPU": "if capability «>= OLDEST_WITH_BFLOAT16 → > (0, 0)»:",
        "decoding without bfloat16":
            '"fp16")« or bfloat16_why_not(self.device) is not None → »\n'},
    "export/test_onnx": {
        "exported step guides scale 1":
            "«guided = torch.where(scale == 1, cond[:, :g], guided) → pass»",
        "exported variance not halved": "(cond[:, c:] + 1) «/ 2  → »* (high - low)"},
    "export/test_onnx_quantized": {"one scale for a whole weight":
        "weight.abs()«.amax(0) → .amax().expand(weight.shape[1])»"},
    "export/test_onnx_command": {"export's error is not bounded":
        "if «not relative <= bound → False»:"},
    "server/test_served_loop": {
        "server draws noise that is not used": "if «self.draws[step] → True» else self.zeros",
        "server's pixels rounded otherwise":
            "np.float32(127.5) * images + np.float32(«128.0 → 127.5»)"},
    "security/test_serve_trust": {
        "changed graph is served": "if «file_hash(path / name) != digest → False»:",
        "link in a repository is served": "or «file.is_symlink() → False» or"},
}
# fmt: on


def planted(name: str, line: str) -> tuple[Path, str]:
    """The file that holds the line of code, which must be there exactly once, and its new text."""
    parts = re.fullmatch("(.*)«(.*) → (.*)»(.*)", line, re.DOTALL)
    assert parts is not None, name
    before, old, new, after = parts.groups()
    found = []
    for path in (path for part in PRODUCT for path in (ROOT / part).rglob("*.*")):
        if path.suffix in (".py", ".h", ".cpp"):
            text = path.read_text(encoding="utf-8")
            found += [(path, text)] * text.count(before + old + after)
    if len(found) != 1:
        raise SystemExit(f"{name}: {before + old + after!r} is in the code {len(found)} times")
    path, text = found[0]
    return path, text.replace(before + old + after, before + new + after)


def build() -> None:
    """The native library of the code as it is now, in place of the one that is there."""
    cmake = str(Path(sys.executable).with_name("cmake"))
    for options in (["-S", ".", "-B", BUILT, "-DCMAKE_BUILD_TYPE=Release"], ["--build", BUILT]):
        subprocess.run([cmake, *options], cwd=ROOT, check=True, capture_output=True)
    (ROOT / BUILT / Path(LIBRARY).name).replace(ROOT / LIBRARY)


def found_by(test: str) -> str | None:
    """The first test that fails of this file, or else of its folder."""
    path = Path("tests", f"{test}.py")
    for place in (path, path.parent):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(place)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        for line in ran.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                return line.split(" ", 1)[1].split(" - ")[0]
        if ran.returncode:
            return f"exit code {ran.returncode}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults, one at a time, and run the tests.")
    parser.add_argument("names", nargs="*", help="only faults whose name holds one of these")
    names = parser.parse_args().names
    faults = [(test, *fault) for test, faults in FAULTS.items() for fault in faults.items()]
    chosen = [fault for fault in faults if not names or any(part in fault[1] for part in names)]
    state = ["git", "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(state, cwd=ROOT, capture_output=True, check=True).stdout:
        raise SystemExit("the checkout has changes: commit them first")
    for _, name, line in chosen:
        planted(name, line)  # so that nothing runs unless each can be planted
    survived, native = 0, False
    try:
        for test, name, line in chosen:
            begun = time.monotonic()
            path, text = planted(name, line)
            original = path.read_bytes()
            path.write_text(text, encoding="utf-8")
            try:
                if path.suffix != ".py":
                    native = True
                    build()
                finder = found_by(test)
            finally:
                path.write_bytes(original)
            survived += finder is None
            print(f"{time.monotonic() - begun:4.0f} s  {name}: {finder or 'SURVIVED'}", flush=True)
    finally:
        if native:
            build()
    print(f"{len(chosen) - survived} of {len(chosen)} found")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
