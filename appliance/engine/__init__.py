"""The engine room: starting vLLM in a cage, watching it, talking to it, and what runs inside its process.

This module imports nothing: the cage and vLLM's own processes import the package too, and every one of them pays for
what stands here. Import from the modules:

- `launcher`: `EngineSpec`, `EngineProcess`, `EngineState`: how vLLM is started and kept running.
- `client`: `EngineClient`: how the gateway talks to it.
- `protocol`: the messages that both sides know; standard library only.
- `cage`: the process between the gateway and vLLM; standard library only.
- `plugin`, `inside`: what vLLM loads.
"""
