"""The tier on disk: KV in encrypted files. No vLLM here; `inside/connector/` makes it one of vLLM's secondary tiers.

`store` is what is called; `index` knows what is there, `files` how it lies on the disk, `opening` tries the folder,
`write_queue` has what waits to be written, `jobs` what the engine waits for, `health` how the disk does. `cipher`
encrypts, `keys` has the keys that the gateway gave, `channel` asks for them, `fingerprint` names the layout.
docs/decisions/0016 says why it is as it is.
"""
