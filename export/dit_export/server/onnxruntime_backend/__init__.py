"""A backend directory for Triton Inference Server; its model.py is copied as it stands."""
