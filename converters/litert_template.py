"""A chat template as LiteRT-LM's engine needs it.

Its Jinja (MiniJinja) has no Python methods and no `{% generation %}`, it renders `bos_token` empty, and a message's
content is a list of parts where Hugging Face's templates expect text. All of that is said in front of the template.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgeft.models.text import load_text_side

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_GET = re.compile(r"\.get\(\s*('[^']+'|\"[^\"]+\")\s*\)")

_TEXTS = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is iterable and message.content is not string -%}
{%- set found = namespace(text="") -%}
{%- for part in message.content -%}
{%- if part is string -%}{%- set found.text = found.text ~ part -%}
{%- elif part.text is defined -%}{%- set found.text = found.text ~ part.text -%}{%- endif -%}
{%- endfor -%}
{%- set plain.messages = plain.messages + [dict(message, content=found.text)] -%}
{%- else -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""


def for_engine(template: str, folder: Path) -> str:
    """The template with a beginning that makes the engine's messages those it was written for.

    Args:
        folder: whose tokenizer_config.json names BOS and EOS.
    """
    own = load_text_side(folder).template
    bos, eos = (own.bos_token, own.eos_token) if own else ("", "")
    tokens = f"{{%- set bos_token = {json.dumps(bos)} -%}}{{%- set eos_token = {json.dumps(eos)} -%}}"
    # What follows a tag loses its first line break; what follows an expression keeps it.
    return tokens + _TEXTS.replace("\n", "") + "{{ '' }}" + _GET.sub(r"[\1]", _GENERATION.sub("", template))
