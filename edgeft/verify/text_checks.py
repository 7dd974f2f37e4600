"""The checks that need no weights: tokenizer and chat template of a file against the model it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgeft.errors import EdgeftError
from edgeft.models.text import TextSide, load_text_side, read_template
from edgeft.plugins import Session, Source
from edgeft.verify.facts import FileFacts
from edgeft.verify.report import Finding
from edgeft.verify.templates import CASES, check_template
from edgeft.verify.tokenizers import Tokenize, check_tokenizer


def trained_text(source: Source) -> TextSide:
    """Tokenizer and template that training used: an adapter that added tokens carries its own.

    Raises:
        ModelError: no tokenizer.json, or a file that cannot be read.
    """
    folder, template = source.base, source.chat_template
    if source.adapter is not None:
        if (source.adapter / "tokenizer.json").is_file():
            folder = source.adapter
        own = source.adapter / "chat_template.jinja"
        if template is None and own.is_file():
            template = read_template(own)
    return load_text_side(folder, template or _base_template(source.base, folder))


def _base_template(base: Path, folder: Path) -> str | None:
    from edgeft.models.text import own_template

    return own_template(folder) or own_template(base)


def check_texts(source: Source, facts: FileFacts, session: Session, texts: Iterable[tuple[str, str]]) -> list[Finding]:
    """Tokenizer, template, and both together as the runtime renders a prompt."""
    trained = trained_text(source)
    findings = [
        check_tokenizer(trained.tokenize, session_tokenize(session), texts),
        check_template(trained.template, facts.template),
    ]
    if trained.template is not None and facts.template is not None:
        findings.append(_check_prompts(trained, session))
    return findings


def session_tokenize(session: Session) -> Tokenize:
    return lambda text: session.tokenize(text, special=True, bos=False)


def _check_prompts(trained: TextSide, session: Session) -> Finding:
    """The token ids a device will feed for a conversation, against those training fed."""
    template = trained.need_template()
    parted = []
    for name, messages in CASES.items():
        try:
            expected = trained.tokenize(template.render(messages))
            got = session.render(messages)
        except EdgeftError:
            # A template may refuse some conversations; check_template compares the refusals.
            continue
        if expected != got:
            parted.append(name)
    if parted:
        return Finding(
            "prompt", False, f"the runtime feeds other prompt tokens for: {', '.join(parted)}", len(parted), 0
        )
    return Finding("prompt", True, "the runtime feeds the prompt tokens that training fed", 0, 0)
