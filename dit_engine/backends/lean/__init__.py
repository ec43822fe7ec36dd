"""The backend of fused kernels."""
