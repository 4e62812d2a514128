"""The audit log's way to a SIEM: a format (`ocsf`), a transport (`syslog`), and what carries one to the other.

Rules:

- A format is pure: an entry and its record become one event, the same one whenever and wherever it is made. So a
  receiver makes it again from the entry and the record that it carries, and finds what was altered: `verify_export`.
- A transport takes bytes and says when it cannot. It knows nothing of the log.
- `shipper` knows where in the log a destination is, and goes on from there whatever happens to the transport.
"""
