"""The audit log's way to a SIEM: a format, a transport, and what carries one to the other.

Rules:

- A format is pure (`formats`): an entry and its record become one event, the same one whenever and wherever it is
  made. So a receiver makes it again from what it carries, and finds what was altered: `verify_export`.
- A transport (`transport`) takes bytes and says when it cannot. It knows nothing of the log.
- `shipper` knows where in the log a destination is, and goes on from there whatever happens to the transport.
- `destinations` lists the formats and the transports that there are; `exports` has the destinations of a node.
"""
