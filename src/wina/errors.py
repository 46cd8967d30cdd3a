"""The errors wina raises on purpose, each naming the thing that is wrong and the remedy."""


class WinaError(Exception):
    """Something failed that the caller can do something about (exit code 1)."""


class UsageError(WinaError, ValueError):
    """The request itself is wrong: a bad value, name or combination (exit code 2)."""
