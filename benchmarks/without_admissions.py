"""The gateway, with admissions taken as recorded at once: what `benchmarks.audit` holds the real one against.

`python -m benchmarks.without_admissions`. Of use for nothing else: what it serves leaves no record of its beginning.
"""

import asyncio
import sys

from api.__main__ import main
from appliance.audit import Event
from appliance.audit.events import TURN_ADMITTED
from appliance.audit.node import NodeAudit


def leave_admissions_out() -> None:
    """From now on, what is to be recorded of an admission is not."""
    begin = NodeAudit.begin

    def begun(self: NodeAudit, *events: Event, privileged: bool = False) -> "asyncio.Future[int]":
        if events[0].kind is not TURN_ADMITTED:
            return begin(self, *events, privileged=privileged)
        recorded: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        recorded.set_result(0)
        return recorded

    NodeAudit.begin = begun  # type: ignore[method-assign]


if __name__ == "__main__":
    leave_admissions_out()
    sys.exit(main())
