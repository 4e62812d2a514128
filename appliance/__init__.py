"""Holdfast's domain: keys, storage, identity, sessions and the engine. No HTTP server, no screen, no Ansible."""

__version__ = "0.1.0"
