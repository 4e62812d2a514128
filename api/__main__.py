"""`python -m api`: the gateway, as `holdfast up` starts it. Settings come from the state directory and the environment.

What it says goes to stderr, which is the gateway's log; why it could not start, to stdout as JSON too. It leaves with 0
when it was told to stop.
"""

import json
import logging
import sys
import time

from appliance.errors import HoldfastError
from appliance.settings import load_settings


def main() -> int:
    """Run the gateway; return its exit status."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        from api.server import serve  # late: an unusable setting is told at once

        serve(load_settings())
    except HoldfastError as error:
        logging.getLogger("holdfast.gateway").critical("%s [%s]", error, error.code)
        # For whoever started it, to tell as its own.
        sys.stdout.write(json.dumps({**error.record(), "fault": error.fault.value}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
