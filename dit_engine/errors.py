"""Errors that are a user's to mend and have no built-in class."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here; the message says what is missing."""


class NotFinite(ValueError):
    """NaN or infinity in the latents or the pixels of a generation; the message names the images,
    the first step, and what helps."""
