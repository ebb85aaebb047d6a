"""OpenAI's API over a registry."""
