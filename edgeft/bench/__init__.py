"""Speed, memory, energy and cost of models, measured: each setting in a process of its own."""
