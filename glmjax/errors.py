"""Errors meant for a person: each message names what was wrong, what was expected, what to do."""


class GlmjaxError(Exception):
    """Root of every error that glmjax raises on purpose; its text can be shown to a user as is."""


class ConfigError(GlmjaxError):
    """A configuration that cannot work: unknown architecture, impossible size, wrong mesh."""


class CheckpointError(GlmjaxError):
    """A checkpoint on disk that is missing, damaged, unfinished or of another shape."""


class InvalidRequestError(GlmjaxError):
    """A request that can never be served: bad parameter, prompt too long. HTTP 400.

    Attributes:
        param: the name of the request field at fault, or None.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ModelNotFoundError(InvalidRequestError):
    """A request for a model that is not served here. HTTP 404."""


class ContextLengthError(InvalidRequestError):
    """A prompt that is too long for the model's context, or leaves no room for what is asked."""


class QueueFullError(GlmjaxError):
    """The waiting queue is at its limit; the same request may succeed later. HTTP 429."""


class EngineStoppedError(GlmjaxError):
    """The engine is draining, closed or has failed; nothing more is served. HTTP 503."""


class RequestFailedError(GlmjaxError):
    """The engine could not finish a request; it serves others on."""
