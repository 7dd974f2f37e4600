"""The client for chat completions, which the cascade has too; it lives in `edgeft.chat_completions`."""

from edgeft.chat_completions import KEY_VARIABLE, SUFFIX, ChatClient, Endpoint, parse_endpoint, read_endpoint

__all__ = ["KEY_VARIABLE", "SUFFIX", "ChatClient", "Endpoint", "parse_endpoint", "read_endpoint"]
