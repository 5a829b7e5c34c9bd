"""Errors that a user can act on: each message says what was expected, what was found, and what to do next."""


class KVUtilsError(Exception):
    """Base class of every error that kvutils raises on purpose."""


class ModelError(KVUtilsError):
    """An unknown, incomplete or unsupported model."""


class ImageError(KVUtilsError):
    """A picture that cannot be opened or cannot be used."""


class LayerError(KVUtilsError):
    """A layer or head that the model does not have."""


class PromptError(KVUtilsError):
    """A prompt that does not fit the model, such as one without the image token."""


class DataError(KVUtilsError):
    """A data set that is missing, half extracted or malformed."""


class ParameterError(KVUtilsError):
    """An unknown or impossible parameter of a notebook, task or command."""


class MemoryLimitError(KVUtilsError):
    """A single image that does not fit the memory of the device."""


class StoreError(KVUtilsError):
    """A stored file that is missing, truncated or does not match its checksum."""
