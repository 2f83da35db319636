"""The engine behind the HTTP APIs that clients speak: OpenAI's and Anthropic's. Imports the engine only."""
