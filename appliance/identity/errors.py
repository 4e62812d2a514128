"""What can go wrong with who is asking. No message holds a secret."""

from typing import ClassVar

from appliance.errors import Fault, HoldfastError


class InvalidApiKey(HoldfastError):
    """The key is unknown, revoked or expired."""

    code: ClassVar[str] = "invalid_api_key"
    fault: ClassVar[Fault] = Fault.UNAUTHENTICATED


class UnknownIdentity(HoldfastError):
    """There is no such tenant, principal or key."""

    code: ClassVar[str] = "identity_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class NameTaken(HoldfastError):
    """There is one of that name already."""

    code: ClassVar[str] = "name_taken"
    fault: ClassVar[Fault] = Fault.CONFLICT


class RoleDiffers(HoldfastError):
    """There is a principal of that name already, and it has another role."""

    code: ClassVar[str] = "role_differs"
    fault: ClassVar[Fault] = Fault.CONFLICT


class NotAnAdministrator(HoldfastError):
    """The user of this machine is not the appliance's administrator."""

    code: ClassVar[str] = "not_an_administrator"
    fault: ClassVar[Fault] = Fault.DENIED


class ModelNotAllowed(HoldfastError):
    """The key's scopes do not include the model."""

    code: ClassVar[str] = "model_not_allowed"
    fault: ClassVar[Fault] = Fault.DENIED


class QuotaReached(HoldfastError):
    """One of the key's limits is reached.

    Attributes:
        retry_after_s: when it is worth asking again; None: that depends on others.
    """

    code: ClassVar[str] = "quota_reached"
    fault: ClassVar[Fault] = Fault.LIMIT

    def __init__(self, message: str, *, cause: str, remedy: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.retry_after_s = retry_after_s


class RateLimited(QuotaReached):
    """Too many requests within a minute."""

    code: ClassVar[str] = "rate_limit_exceeded"


class TooManyConcurrent(QuotaReached):
    """Too many requests at once."""

    code: ClassVar[str] = "too_many_concurrent_requests"


class DailyTokensSpent(QuotaReached):
    """The day's tokens are used or reserved."""

    code: ClassVar[str] = "daily_tokens_spent"
