"""An HTTP server that speaks OpenAI's protocol to models on this machine."""
