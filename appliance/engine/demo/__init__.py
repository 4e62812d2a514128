"""The demonstration model: a chat model of three million parameters, trained here from conversations made here.

This module imports nothing. Import from the modules:

- `conversations`: what the model is trained on, and the agent loop that benchmarks run; standard library only.
- `tokenizer`, `llama`, `train`, `random_model`: run in the engine's environment.
- `model/`: the committed weights, configuration, tokenizer and chat template.
"""
