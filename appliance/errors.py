"""The base of every error that a person can meet.

Rules:

- Each error lives in the room that raises it and derives from `HoldfastError`.
- `code` is stable and unique: scripts branch on it, the documentation is indexed by it.
- `message` says what failed, `cause` why, `remedy` what to do next. None of the three holds a secret or a person's
  text.
- `fault` says whose fault it was. The API derives its HTTP status from it and the command line its exit status, so
  that a room names neither.
"""

import enum
from typing import ClassVar, TypedDict


class Fault(enum.StrEnum):
    """Whose fault an error is, and with that what a caller should do about it."""

    CALLER = "caller"  # the request is wrong: do not repeat it unchanged
    UNAUTHENTICATED = "unauthenticated"  # who is asking is not known
    DENIED = "denied"  # who is asking is known and may not
    MISSING = "missing"  # what was asked for is not there (or must not be seen to be)
    CONFLICT = "conflict"  # it contradicts what is there already
    LIMIT = "limit"  # a quota or a bound was reached: later, or less
    UNAVAILABLE = "unavailable"  # a part is not ready (sealed, starting, down): later
    ENVIRONMENT = "environment"  # this machine lacks a right, a package, space
    INTERNAL = "internal"  # a defect of ours


class ErrorRecord(TypedDict):
    """An error as programs see it."""

    code: str
    message: str
    cause: str
    remedy: str


REGISTRY: dict[str, type["HoldfastError"]] = {}


class HoldfastError(Exception):
    """An error with a stable code, a cause and a remedy.

    Raises:
        TypeError: when a subclass reuses the code of another one.
    """

    code: ClassVar[str] = "internal_error"
    fault: ClassVar[Fault] = Fault.INTERNAL

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in cls.__dict__:
            return
        if REGISTRY.setdefault(cls.code, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"error code {cls.code!r} belongs to {REGISTRY[cls.code].__qualname__} already")

    def __init__(self, message: str, *, cause: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.remedy = remedy

    def record(self) -> ErrorRecord:
        """The error for programs: `{code, message, cause, remedy}`."""
        return {"code": self.code, "message": self.message, "cause": self.cause, "remedy": self.remedy}

    def __str__(self) -> str:
        return f"{self.message}: {self.cause}. {self.remedy}" if self.cause else f"{self.message}. {self.remedy}"


REGISTRY[HoldfastError.code] = HoldfastError
