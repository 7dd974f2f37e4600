"""A tiny Hugging Face model that counts through the alphabet, and attends to all of its context while it does so.

After a letter comes the next one, after a line break "a": its text is known to whoever runs it. The layers in between
are random and small, so that log-probabilities depend on every token before, but the letter does not.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tiny

LETTERS = string.ascii_lowercase
ANSWER = LETTERS * 20
WIDTH = 320


def write_letters(folder: Path, *, noise: float = 0.02, logit: float = 16.0, **settings: Any) -> Path:
    import torch
    import transformers

    chosen = {
        "hidden_size": WIDTH,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": WIDTH // 5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        **settings,
    }
    tiny.write_loadable(folder, **chosen)
    template = tiny.TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter) * noise)
        tokens = model.config.vocab_size
        model.model.embed_tokens.weight.copy_(torch.eye(tokens, WIDTH))
        head = torch.zeros(tokens, WIDTH)
        for now, then in zip("\n" + LETTERS, LETTERS + "a", strict=True):
            one, other = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in (now, then))
            head[other, one] = logit / WIDTH**0.5
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    return folder
