"""Chat templates come from strangers: they render what the model was trained with, reach nothing else, and end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgeft.chat import ChatTemplate
from edgeft.errors import ModelError

ASK = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user" if at % 2 == 0 else "assistant", "content": "word " * 200} for at in range(400)]

REACHING_OUT = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__class__ }}",
    "{{ messages[0]['__class__'].__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ ('{0.__class__}'|string).format_map({'0': 1}) }}",
    "{{ [1]|map(attribute='__class__')|list|first.mro() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'content': 'changed'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{{ environment.globals }}{{ environment.tick.x.y }}",
]
"""Attributes of Python's own, formats that reach for them, changes to what it was given, other files."""

LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ ([0] * 10**10)|length }}",
    "{{ 9**(9**9) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a\n'|indent(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:{w}}'.format_map({'w': 10**9}) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ [1]|batch(10**9, 'x')|list|length }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ range(10**12)|list }}",
    "{{ (1, 2) * 10**9 }}",
    "{% set x = 'a' * 1000 %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{% set x = 'a' * 1000 %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "{% set x = 'a' * 1000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "{% set x = 'a' * 5000 %}{% set x = x.replace('a', x) %}{% set x = x.replace('a', x) %}{{ x }}",
    "{% set x = 'a' * 5000 %}{% set x = x|replace('a', x)|replace('a', x) %}{{ x }}",
    "{% set x = 'a' * 5000 %}{% set x = x.join(x) %}{% set x = x.join(x) %}{{ x }}",
    "{% set x = 'a' * 5000 %}{% set x = x|join(x)|join(x) %}{{ x }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}aaaa{% endmacro %}{{ f(40) }}",
    "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
]
"""What would fill the memory, in one step or by doubling."""

NESTED = "{% set x = ['aaaa'] %}" + "{% set x = [x, x, x, x] %}" * 25
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{% if f(n - 1) %}{% endif %}{% if f(n - 1) %}{% endif %}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    NESTED + "{{ x }}",
    NESTED + "{{ x ~ '' }}",
    NESTED + "{{ x|tojson }}",
    NESTED + "{{ x|string|length }}",
    NESTED + "{{ '%s' % x }}",
    NESTED + "{{ '{}'.format(x) }}",
    NESTED + "{% set y = x %}{{ x == [y] }}{{ x|sort }}",
    NESTED + NESTED.replace("x", "y") + "{% if x == y %}{% endif %}",
    NESTED + NESTED.replace("x", "y") + "{% if y in [x] %}{% endif %}",
    NESTED + NESTED.replace("x", "y") + "{% if x is eq(y) %}{% endif %}",
    NESTED + NESTED.replace("x", "y") + "{{ [x].index(y) }}",
    NESTED + "{{ raise_exception(x) }}",
    NESTED + "{% set ns = namespace(a=x) %}{{ ns }}",
    NESTED.replace("[", "(").replace("]", ",)") + "{{ {x: 1} }}",
    NESTED.replace("[", "(").replace("]", ",)") + "{{ {}[x] }}",
    NESTED.replace("[", "(").replace("]", ",)") + "{{ [x]|unique|list|length }}",
    "{% set x = 'a' * 100000 %}{% for i in range(99999) %}{% for j in range(99999) %}{% if 'b' in x %}{% endif %}"
    "{% endfor %}{% endfor %}",
    "{% set x = 'a' * 100000 %}{% for i in range(99999) %}{% for j in range(99999) %}{% set y = x[1:] %}{% endfor %}"
    "{% endfor %}",
]
"""What would go on for ever, or nearly so."""

BROKEN = [
    "{{ 1 / 0 }}",
    "{{ 'x'.index('y') }}",
    "{{ messages[0].content.encode('nonsense') }}",
    "{{ ''.join([1]) }}",
    "{{ undefined_name.attribute }}",
    "{% for %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ " + "1+" * 50_000 + "1 }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "{{ strftime_now(5) }}",
    "{{ messages|nonsense }}",
    "{# never closed",
    "x" * (1 << 20),
    "{{ raise_exception('roles must alternate') }}",
    "{{ (1).__add__ }}{{ 5|attr }}",
]
"""Mistakes of every kind that Python has."""

# One process for all: it may take little more memory than it has after its imports.
RENDER = """
import json, resource, sys, time
from pathlib import Path
from edgeft.chat import ChatTemplate
from edgeft.errors import ModelError
from edgeft import template_sandbox
template_sandbox.SECONDS = 1.0
messages = [{"role": "user", "content": "hi"}]
ChatTemplate("{{ messages[0].content }}").render(messages)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (400 << 20), resource.RLIM_INFINITY))
for source in json.load(sys.stdin):
    started = time.monotonic()
    try:
        said = "rendered " + ChatTemplate(source).render(messages)[:100]
    except ModelError as error:
        said = error.message
    print(json.dumps([said, time.monotonic() - started]), flush=True)
"""


def rendered_apart(sources: list[str]) -> list[tuple[str, float]]:
    """What became of each, and the seconds it took."""
    done = subprocess.run(
        [sys.executable, "-c", RENDER], input=json.dumps(sources), capture_output=True, text=True, timeout=400
    )
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(sources), f"{sources[len(found)][:200]}: {done.returncode} {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("source", REACHING_OUT)
def test_a_template_reaches_nothing_but_the_conversation(source: str) -> None:
    messages = [dict(message) for message in ASK]
    try:
        text = ChatTemplate(source).render(messages)
    except ModelError as error:
        assert "chat template" in error.message
    else:
        assert not any(word in text for word in ("class", "module", "function", "root:", "object at"))
    assert messages == ASK


def test_a_template_cannot_fill_the_memory() -> None:
    for source, (said, seconds) in zip(LARGE, rendered_apart(LARGE), strict=True):
        assert said.startswith("the chat template cannot render this conversation: "), (source[:200], said)
        assert "MemoryError" not in said, source[:200]
        assert seconds < 5, source[:200]


def test_a_template_ends() -> None:
    for source, (said, seconds) in zip(ENDLESS, rendered_apart(ENDLESS), strict=True):
        assert said.startswith("the chat template cannot render this conversation: "), (source[-200:], said)
        assert "MemoryError" not in said, source[-200:]
        assert seconds < 4, source[-200:]


def test_a_template_that_fails_is_a_model_error() -> None:
    for source, (said, _) in zip(BROKEN, rendered_apart(BROKEN), strict=True):
        assert said.startswith("the chat template cannot render this conversation: "), (source[:200], said)
        assert len(said) < 1000


def test_the_templates_own_words_are_passed_on() -> None:
    with pytest.raises(ModelError, match=r"this conversation: roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(ASK)


# --- What templates of real models need ---------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "set", "parameters": {"type": "object", "properties": {"x": {}}}}}]
REAL = """
{%- set ns = namespace(last=messages|length - 1, system='') -%}
{%- for message in messages[::-1] -%}
  {%- if message.role == "user" and not message.content.startswith('<tool_response>') -%}
    {%- set ns.last = (messages|length - 1) - loop.index0 -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- macro turn(role, text) -%}{{ '<|' ~ role ~ '|>' + text|trim }}{%- endmacro -%}
{%- if tools %}{{ tools|tojson }}{{ tools|map(attribute='function')|map(attribute='name')|join(', ') }}{% endif -%}
{%- for message in messages if message.role in ('user', 'assistant') -%}
  {%- set content = message.content|replace('<think>', '') -%}
  {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
  {{- turn(message['role'], content) }}
  {%- generation %}{{ loop.index0 % 2 }}{% endgeneration -%}
  {%- if loop.last and add_generation_prompt %}{{ '%s-%02d' % ('end', ns.last) }}{% endif -%}
{%- endfor -%}
"""


def transformers_render(source: str, messages: list[dict[str, Any]], tools: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], tools=tools, chat_template=source, add_generation_prompt=True)
    return str(texts[0])


@pytest.mark.parametrize("messages", [ASK, [*LONG[:5], {"role": "user", "content": "a</think>\n b"}]])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_transformers(messages: list[dict[str, Any]], tools: Any) -> None:
    pytest.importorskip("transformers")
    expected = transformers_render(REAL, messages, tools)
    assert ChatTemplate(REAL).render(messages, tools=tools) == expected


def test_a_long_conversation_is_within_the_budget() -> None:
    started = time.monotonic()
    text = ChatTemplate(REAL).render(LONG, tools=TOOLS)
    assert text.count("word") == 400 * 200
    assert time.monotonic() - started < 5


def test_a_message_of_megabytes_is_within_the_budget() -> None:
    text = "line of text\n" * 300_000
    assert len(ChatTemplate(REAL).render([{"role": "user", "content": text}])) > 3_800_000


def test_published_templates_render_as_in_transformers(cache: Path) -> None:
    """Those of Llama 3.2, Qwen 2.5 and Qwen 3, where the tests have fetched them."""
    pytest.importorskip("transformers")
    found = sorted(cache.glob("tokenizer-*/models/tokenizer_config.json"))
    if not found:
        pytest.skip("fetched by the reference tests")
    for file in found:
        config = json.loads(file.read_text())
        source = config.get("chat_template")
        if isinstance(source, str) and "strftime" not in source and "llama3" not in str(file):
            ours = ChatTemplate(source, config.get("bos_token") or "", config.get("eos_token") or "")
            assert ours.render(ASK, tools=TOOLS).endswith(transformers_render(source, ASK, TOOLS)[-200:]), file
