"""The front of the appliance: an OpenAI-compatible listener for agents and an admin listener for people.

Importing this package imports nothing else: the engine's environment reads `api.openai.fields`, and the command line
reads `api.admin.client`.
"""
