"""What starts vLLM, talks to it and keeps its state.

Nothing is re-exported here: the gateway's environment and the engine's import different halves of this room.
"""
