"""Who is asking, and how much they may ask for."""

from appliance.identity.directory import DAMAGE, Identity
from appliance.identity.errors import (
    DailyTokensSpent,
    InvalidApiKey,
    ModelNotAllowed,
    NameTaken,
    NotAnAdministrator,
    QuotaReached,
    RateLimited,
    RoleDiffers,
    TooManyConcurrent,
    UnknownIdentity,
)
from appliance.identity.quotas import Admission, Quotas
from appliance.identity.types import ApiKey, Caller, Isolation, Permission, Principal, Role, RotatedKeys, Scopes, Tenant

__all__ = [
    "DAMAGE",
    "Admission",
    "ApiKey",
    "Caller",
    "DailyTokensSpent",
    "Identity",
    "InvalidApiKey",
    "Isolation",
    "ModelNotAllowed",
    "NameTaken",
    "NotAnAdministrator",
    "Permission",
    "Principal",
    "QuotaReached",
    "Quotas",
    "RateLimited",
    "Role",
    "RoleDiffers",
    "RotatedKeys",
    "Scopes",
    "Tenant",
    "TooManyConcurrent",
    "UnknownIdentity",
]
