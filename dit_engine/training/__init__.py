"""Training of small latent Diffusion Transformers (``dit-train``): autoencoder, then DiT."""
