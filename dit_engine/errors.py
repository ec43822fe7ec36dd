"""Errors that a user can mend, and that no built-in class describes."""


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says what is missing."""


class NotFinite(ValueError):
    """NaN or infinity in the latents or the pixels of a generation; the message names the images,
    the first step, and what helps."""
