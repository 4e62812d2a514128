"""The one shape that every error has for a client."""

import json

import pytest

from api.openai.errors import BodyTooLarge, EngineStarting, RequestError, error_object, retry_after_s, status_of
from appliance.errors import REGISTRY, Fault, HoldfastError
from appliance.identity import InvalidApiKey, RateLimited


def test_an_error_says_what_why_and_what_next() -> None:
    error = RequestError("x cannot be used", cause="it is too big", remedy="Make it smaller", param="x")
    assert json.loads(error_object(error, "req-1")) == {
        "error": {
            "message": "x cannot be used: it is too big. Make it smaller",
            "type": "invalid_request_error",
            "param": "x",
            "code": "invalid_request",
            "cause": "it is too big",
            "remedy": "Make it smaller",
            "request_id": "req-1",
        }
    }


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.CALLER, 400),
        (Fault.UNAUTHENTICATED, 401),
        (Fault.DENIED, 403),
        (Fault.MISSING, 404),
        (Fault.CONFLICT, 409),
        (Fault.LIMIT, 429),
        (Fault.UNAVAILABLE, 503),
        (Fault.ENVIRONMENT, 503),
        (Fault.INTERNAL, 500),
    ],
)
def test_the_status_follows_from_whose_fault_it_was(fault: Fault, status: int) -> None:
    error = HoldfastError("x", cause="y", remedy="z")
    vars(error)["fault"] = fault
    assert status_of(error) == status


def test_every_error_there_is_has_a_status() -> None:
    for kind in REGISTRY.values():
        assert 400 <= (getattr(kind, "status", None) or status_of(kind.__new__(kind))) < 600


def test_an_exact_status_wins() -> None:
    assert status_of(BodyTooLarge("x", cause="y", remedy="z")) == 413
    assert status_of(InvalidApiKey("x", cause="y", remedy="z")) == 401


def test_when_to_come_back_is_in_whole_seconds() -> None:
    assert retry_after_s(RateLimited("x", cause="y", remedy="z", retry_after_s=0.2)) == 1
    assert retry_after_s(RateLimited("x", cause="y", remedy="z", retry_after_s=2.1)) == 3
    assert retry_after_s(EngineStarting("x", cause="y", remedy="z")) == 2
    assert retry_after_s(RateLimited("x", cause="y", remedy="z")) is None
    assert retry_after_s(BodyTooLarge("x", cause="y", remedy="z")) is None
