"""The audit log: append-only, verifiable without a key, and witnessed on removable media."""
