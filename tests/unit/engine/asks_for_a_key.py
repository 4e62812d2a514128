"""Stands in for vLLM: its core, which it spawns, asks for the key of a session's tier and writes down what it got."""

import multiprocessing
import os
from pathlib import Path

from appliance.engine.inside.disk.channel import KeyAsker
from appliance.engine.inside.disk.cipher import NONCE_BYTES
from appliance.engine.inside.disk.files import Owner
from appliance.engine.tier_keys import hand_down, inherited_socket


def core() -> None:
    asker = KeyAsker(inherited_socket(os.environ))
    cipher = asker.keys.wait(Owner("acme", "ana"))
    sealed = bytearray(8)
    if cipher is not None:
        cipher.seal(bytes(NONCE_BYTES), b"", memoryview(b"the text"), memoryview(sealed))
    part = Path("core-said.part")
    part.write_text(sealed.hex())
    part.rename("core-said")


if __name__ == "__main__":
    hand_down(os.environ)
    process = multiprocessing.get_context("spawn").Process(target=core)
    process.start()
    process.join()
