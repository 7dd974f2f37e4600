"""A session on llama.cpp's C interface; what `llama-cpp-python` and `xllamacpp` share."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.chat import Cancel, ChatTemplate, Delta, Message, Sampling, TokenIds
from edgeft.errors import ModelError, UsageError
from edgeft.models.adapter_file import check_base
from edgeft.models.gguf_check import check_loadable
from edgeft.plugins import AdapterScale, LoadOptions

from .json_grammar import schema_to_grammar
from .llama_answer import Answer, Logprobs
from .llama_api import Batch, Library, SamplerChainParams, Token, abort_function, scored_batch
from .llama_load import (
    cache_bytes,
    llama_choices,
    load_model,
    make_context,
    metadata,
    repacking,
    uses_flash_attention,
)
from .llama_prompt_state import PromptState
from .llama_state import common, fingerprint
from .prompt_lookup import PromptLookup
from .sampler import log_softmax
from .session_base import ClosingSession, check_score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SCORE_ROWS = 128
"""Positions scored at once: 128 rows of a 150,000-token vocabulary are 77 MB."""
_PENALTY_WINDOW = 64
_ABORTED = 2
_COMPOSING = frozenset({"qwen2", "qwen35"})
"""Pre-tokenizers whose models compose characters (Unicode NFC) before they split; llama.cpp leaves that out."""


class LlamaSession(ClosingSession):
    """One model, one context, one sequence whose keys and values are kept between calls."""

    def __init__(self, library: Library, path: Path, options: LoadOptions, flash_attention: bool = True) -> None:
        self._lib, self._path = library, path
        self._model = self._ctx = None
        self._adapters: dict[Path, int] = {}
        self._cached: TokenIds = []
        self._turn = 0
        self._flag = ctypes.create_string_buffer(2)
        check_loadable(path)
        flash = uses_flash_attention(options, flash_attention)
        repack = repacking(library, path, options)
        self._model = load_model(library, path, options, repack=repack.value == "on")
        self._vocab = library.llama_model_get_vocab(self._model)
        self._composes = metadata(library, self._model, "tokenizer.ggml.pre") in _COMPOSING
        self._ctx = make_context(library, self._model, options, path, flash)
        self._memory = library.llama_get_memory(self._ctx)
        self.context = int(library.llama_n_ctx(self._ctx)) // options.parallel
        self.cache_bytes = cache_bytes(library, self._model, self.context, options.kv_type) * options.parallel
        self.vocabulary = int(library.llama_vocab_n_tokens(self._vocab))
        self._batch, self._guesses = options.batch, self._can_guess(options)
        self.choices = llama_choices(options, repack, flash)
        self._state = PromptState(options.state, self._about(options, flash, repack.value) if options.state else {})

    def close(self) -> None:
        """Free the model and everything that belongs to it. Calling it again does nothing."""
        if self._ctx is not None:
            self._lib.llama_free(self._ctx)
            self._ctx = None
        for adapter in self._adapters.values():
            self._lib.llama_adapter_lora_free(adapter)
        self._adapters = {}
        if self._model is not None:
            self._lib.llama_model_free(self._model)
            self._model = None

    @property
    def notes(self) -> Sequence[str]:
        """What a user may want to know that changed no answer."""
        return self._state.notes

    def _about(self, options: LoadOptions, flash_attention: bool, repack: str) -> dict[str, Any]:
        """What the keys and values of a text depend on, but for the text and the adapters."""
        template = self._lib.llama_model_chat_template(self._model, None) or b""
        return {
            "model": fingerprint(self._path),
            "template": hashlib.sha256(template).hexdigest(),
            "library": fingerprint(self._lib.path),
            "context": self.context,
            "batch": options.batch,
            "flash attention": flash_attention,
            "repack": repack,
            "kv type": options.kv_type,
        }

    def _can_guess(self, options: LoadOptions) -> bool:
        lib = self._lib
        remembers = not lib.llama_model_is_recurrent(self._model) and not lib.llama_model_is_hybrid(self._model)
        if options.lookup and not remembers:
            self.close()
            raise UsageError(
                f"{self._path} has recurrent layers, which cannot take back a wrong guess", "Leave out --lookup."
            )
        return bool(options.lookup)

    def _context(self) -> int:
        assert self._ctx is not None
        return self._ctx

    def _alive(self) -> None:
        if self._ctx is None:
            raise ModelError(f"the session on {self._path} is closed")

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        prompt = self._render(messages, tools)
        if self._state.on and [message["role"] for message in messages[:2]] == ["system", "user"]:
            # What two questions have in common, so that no user's words are kept.
            others = (self._render([messages[0], {"role": "user", "content": word}], tools) for word in ("0", "a"))
            self._state.expect(common(*others))
        return prompt

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> TokenIds:
        return self.tokenize(self.template().render(messages, tools=tools), special=True, bos=True)

    def template(self) -> ChatTemplate:
        """The model's own template. Raises: ModelError when the file has none."""
        self._alive()
        source = self._lib.llama_model_chat_template(self._model, None)
        if not source:
            raise ModelError(
                f"{self._path} has no chat template, and edgeft does not guess one",
                "Export the model again from a base that has one, or use a plain-text prompt.",
            )
        lib, vocab = self._lib, self._vocab
        return ChatTemplate(
            source.decode(), self._text(lib.llama_vocab_bos(vocab)), self._text(lib.llama_vocab_eos(vocab))
        )

    def _text(self, token: int) -> str:
        text = self._lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        self._alive()
        try:
            data = (unicodedata.normalize("NFC", text) if self._composes else text).encode()
        except UnicodeEncodeError as error:  # halves of a surrogate pair: arguments and files that were not UTF-8
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        room = (Token * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), False, special)
        if count < 0:
            raise ModelError(f"{self._path}: the tokenizer cannot read this text ({len(data)} bytes)")
        tokens = list(room[:count])
        first = self._lib.llama_vocab_bos(self._vocab)
        # A template may already have written the token: two of them make a model worse.
        if bos and self._lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [first]:
            tokens.insert(0, first)
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._alive()
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        room = ctypes.create_string_buffer(64)
        size = self._lib.llama_token_to_piece(self._vocab, token, room, len(room), 0, False)
        if size < 0:
            room = ctypes.create_string_buffer(-size)
            size = self._lib.llama_token_to_piece(self._vocab, token, room, len(room), 0, False)
        return room.raw[:size]

    # --- Generation ---------------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        self._check_prompt(prompt)
        sampler = self._sampler(sampling, prompt)
        cancel = Cancel() if cancel is None else cancel  # an unthrown switch is false
        try:
            with self._aborting(cancel):
                yield from self._stream(prompt, sampling, sampler, cancel)
        finally:
            self._lib.llama_sampler_free(sampler)
            self._state.write()

    def _check_prompt(self, prompt: TokenIds) -> None:
        self._alive()
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}",
                "Shorten the conversation, or load the model with a longer --context.",
            )

    @contextlib.contextmanager
    def _aborting(self, cancel: Cancel) -> Iterator[None]:
        """Let `cancel` reach into a running batch.

        Every answer has a flag of its own: a switch that is thrown at the very end of one must not stop the next.
        """
        self._flag = flag = ctypes.create_string_buffer(2)

        def stop() -> None:
            flag[0] = b"\1"

        self._lib.llama_set_abort_callback(self._ctx, abort_function(), ctypes.addressof(flag))
        try:
            with cancel.calls(stop):
                yield
        finally:
            # A stream that was left half read ends here whenever it is collected, perhaps during the next one.
            if self._ctx is not None and self._flag is flag:
                self._lib.llama_set_abort_callback(self._ctx, None, None)

    def _stream(self, prompt: TokenIds, sampling: Sampling, sampler: int, cancel: Cancel) -> Iterator[Delta]:
        answer = Answer(len(prompt), sampling)
        answer.reused, turn = self._begin(prompt), self._turn
        ready = not cancel and self._prefill_keeping(prompt, answer.reused)
        one = (Token * 1)()
        batch = Batch(n_tokens=1, token=one)
        lookup = PromptLookup(prompt) if self._guesses else None
        guessed: TokenIds = []
        row = -1  # of the last batch's outputs: of a prompt the last, of a batch with guesses one per token
        here = len(prompt)  # tokens that are known to be right
        while ready and not cancel:
            token = self._lib.llama_sampler_sample(sampler, self._ctx, row)
            if not answer.sampled(self._lib.llama_vocab_is_eog(self._vocab, token)):
                break
            logprobs = self._logprobs(token, sampling.top_logprobs, row)
            yield answer.add(token, self._piece(token), logprobs, here >= self.context)
            self._check_turn(turn)
            if answer.reason:
                break
            here += 1
            if lookup is None:
                one[0] = token
                ready = self._decode(batch, [token])
                continue
            lookup.extend([token])
            if guessed and guessed[0] == token:
                guessed, row = guessed[1:], row + 1
                continue
            self._take_back(here - 1)
            guessed = lookup.guess(min(answer.room - 1, self.context - here, self._batch - 1))
            ready, row = self._decode(scored_batch([token, *guessed], here - 1), [token, *guessed]), 0
        yield answer.last()

    def _check_turn(self, turn: int) -> None:
        """A stream may be read on only while nothing else has used the session: they share one cache."""
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    def _reuse(self, tokens: TokenIds, most: int) -> int:
        """Keep the keys and values of the longest common prefix, at most `most` tokens; drop the rest."""
        self._turn += 1
        shared = 0
        for mine, theirs in zip(self._cached, tokens[:most], strict=False):
            if mine != theirs:
                break
            shared += 1
        if shared < len(self._cached) and not self._lib.llama_memory_seq_rm(self._memory, 0, shared, -1):
            # Recurrent models cannot forget a part.
            self._lib.llama_memory_clear(self._memory, True)
            shared = 0
        self._cached = self._cached[:shared]
        return shared

    def _take_back(self, length: int) -> None:
        """Forget what was computed for guesses that came out wrong."""
        if length < len(self._cached):
            self._lib.llama_memory_seq_rm(self._memory, 0, length, -1)
            self._cached = self._cached[:length]

    def _begin(self, prompt: TokenIds) -> int:
        """How many tokens of the prompt need not be computed: they are cached, or their state is on the disk."""
        reused, prefix = self._reuse(prompt, len(prompt) - 1), self._state.prefix_of(prompt)
        if reused >= len(prefix):
            return reused
        self._lib.llama_memory_clear(self._memory, True)
        self._cached = []
        if self._state.read(prefix, self._lib, self._context()):
            self._cached = list(prefix)
        else:
            self._lib.llama_memory_clear(self._memory, True)
        return len(self._cached)

    def _prefill_keeping(self, prompt: TokenIds, start: int) -> bool:
        """Evaluate `prompt[start:]`, and take the state of its system prompt on the way; False when cancelled."""
        prefix = self._state.prefix_of(prompt)
        if start < len(prefix):
            if not self._prefill(prefix, start):
                return False
            self._state.take(prefix, self._lib, self._context())
            start = len(prefix)
        return self._prefill(prompt, start)

    def _prefill(self, tokens: TokenIds, start: int) -> bool:
        """Evaluate `tokens[start:]`; False when cancelled."""
        for at in range(start, len(tokens), self._batch):
            part = tokens[at : at + self._batch]
            if not self._decode(Batch(n_tokens=len(part), token=(Token * len(part))(*part)), part):
                return False
        return True

    def _decode(self, batch: Batch, tokens: TokenIds) -> bool:
        """Evaluate one batch after what is cached; False when it was aborted, with the cache as before."""
        code = self._lib.llama_decode(self._ctx, batch)
        if code == 0:
            self._cached += tokens
            return True
        self._lib.llama_memory_seq_rm(self._memory, 0, len(self._cached), -1)
        if code == _ABORTED:
            return False
        raise ModelError(f"llama.cpp could not evaluate {len(tokens)} tokens (code {code}){self._said()}")

    def _said(self) -> str:
        return f": {self._lib.errors[-1]}" if self._lib.errors else ""

    def _sampler(self, sampling: Sampling, prompt: TokenIds) -> int:
        """A sampler chain, in the order of llama.cpp's own tools."""
        lib = self._lib
        chain = lib.llama_sampler_chain_init(SamplerChainParams(True))
        if sampling.json_schema is not None:
            lib.llama_sampler_chain_add(chain, self._grammar_sampler(sampling.json_schema))
        if sampling.repeat_penalty != 1.0:
            penalties = lib.llama_sampler_init_penalties(
                self.vocabulary, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
            )
            for token in prompt[-_PENALTY_WINDOW:]:
                lib.llama_sampler_accept(penalties, token)
            lib.llama_sampler_chain_add(chain, penalties)
        if sampling.temperature <= 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return int(chain)
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF))
        return int(chain)

    def _grammar_sampler(self, schema: Mapping[str, Any]) -> int:
        grammar = schema_to_grammar(schema)
        sampler = self._lib.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not sampler:
            raise UsageError(f"llama.cpp cannot follow this JSON schema: {json.dumps(schema)[:200]}")
        return int(sampler)

    def _logprobs(self, token: int, top: int, row: int = -1) -> Logprobs:
        """Of what the last batch said after its token `row`; -1 is its last output."""
        if not top:
            return None, ()
        import numpy as np

        top = min(top, self.vocabulary)
        pointer = self._lib.llama_get_logits_ith(self._ctx, row)
        values = log_softmax(np.ctypeslib.as_array(pointer, shape=(1, self.vocabulary)))[0]
        best = np.argpartition(values, -top)[-top:]
        best = best[np.argsort(values[best])[::-1]]
        return float(values[token]), tuple((int(index), float(values[index])) for index in best)

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """The last batch's outputs, shape (rows, vocabulary). A view: llama.cpp overwrites it at the next batch."""
        import numpy as np

        pointer = self._lib.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))

    # --- Scoring ------------------------------------------------------------

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        import numpy as np

        self._alive()
        check_score(len(tokens), start, self.context)
        result = np.empty((len(tokens) - start, self.vocabulary), np.float32)
        reused = self._reuse(tokens, start)
        self._prefill(tokens[:start], reused)
        rows = min(_SCORE_ROWS, self._batch)  # llama.cpp ends the process when given more than a batch
        for at in range(start, len(tokens), rows):
            part = tokens[at : at + rows]
            self._decode(scored_batch(part, at), part)
            result[at - start : at - start + len(part)] = log_softmax(self._logits(len(part)))
        return result

    # --- Adapters -----------------------------------------------------------

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        scale_of: dict[int, float] = {}
        for adapter in adapters:
            # llama.cpp keeps one scale per adapter: given twice, the second would be ignored.
            handle = self._adapter(adapter.path.absolute())
            scale_of[handle] = scale_of.get(handle, 0.0) + adapter.scale
        handles, count = list(scale_of), len(scale_of)
        scales = (ctypes.c_float * count)(*scale_of.values())
        if self._lib.llama_set_adapters_lora(self._ctx, (ctypes.c_void_p * count)(*handles), count, scales):
            raise ModelError(f"llama.cpp refused the adapters{self._said()}")
        self._state.use_adapters(adapters)
        self._turn += 1
        # What is cached was computed with other weights.
        self._lib.llama_memory_clear(self._memory, True)
        self._cached = []

    def _adapter(self, path: Path) -> int:
        if path not in self._adapters:
            if not path.is_file():
                raise ModelError(f"no adapter at {path}")
            check_base(path, self._path)
            self._lib.forget_errors()
            handle = self._lib.llama_adapter_lora_init(self._model, str(path).encode())
            if not handle:
                raise ModelError(f"{path} is not an adapter for {self._path.name}{self._said()}")
            self._adapters[path] = handle
        return self._adapters[path]
