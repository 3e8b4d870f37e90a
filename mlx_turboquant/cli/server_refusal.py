"""The error of a request that the server refuses for its KV bytes: an HTTP status, and when to try again."""


class RefusedError(ValueError):
    """A refusal.

    Args:
        status: of HTTP: 503 where it may fit later, 413 where it never will.
        message: for the client.
        retry_after: seconds for the header Retry-After; None for no header.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
