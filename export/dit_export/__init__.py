"""Exports of Diffusion Transformers: ONNX graphs, TensorRT engines, Triton Server repositories."""
