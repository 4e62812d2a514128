"""The tier on disk: KV in encrypted files. No vLLM here; `inside/connector/` makes it one of vLLM's secondary tiers.

`store` is what is called; `index` knows what is there, `files` how it lies on the disk, `cipher` encrypts, `keys` has
the keys that the gateway gave. docs/decisions/0016 says why it is as it is.
"""
