"""Several answers at a time on llama.cpp: each has a sequence of the cache, and one batch computes a token of each.

Decoding reads all weights for every batch, whether it makes one token or eight: together they cost little more time
than one alone. A thread of the session's own builds the batches; the threads that read answers wait for theirs.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator, Sequence
from ctypes import c_int8, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from edgeft.chat import Cancel, Delta, Sampling, TokenIds
from edgeft.errors import EdgeftError, ModelError, UsageError
from edgeft.plugins import AdapterScale, LoadOptions

from .llama_answer import Answer
from .llama_api import Batch, Library, Token, abort_function
from .llama_session import _ABORTED, LlamaSession
from .llama_state import common

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BESIDE = 128
"""Prompt tokens evaluated in one batch while answers are being written: what those wait for the newcomer."""


class Slot:
    """A sequence of the cache, and the tokens whose keys and values it has."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cached: TokenIds = []
        self.free = True
        self.left = 0
        """When it became free, in a count of answers: the longest ago is given away first."""


class Stream:
    """One answer that waits for a slot, or is being written."""

    def __init__(self, prompt: TokenIds, sampling: Sampling, sampler: int, cancel: Cancel) -> None:
        self.prompt, self.sampling, self.sampler, self.cancel = prompt, sampling, sampler, cancel
        self.answer = Answer(len(prompt), sampling)
        self.pending: TokenIds = []
        """Tokens that are to be evaluated before the next one can be chosen."""
        self.slot: Slot | None = None
        self.left = False
        """Nobody reads on."""
        self.out: SimpleQueue[Delta | EdgeftError] = SimpleQueue()

    @property
    def over(self) -> bool:
        return self.left or bool(self.cancel) or self.answer.reason is not None


@dataclass(frozen=True)
class Part:
    """What one answer has in a batch."""

    stream: Stream
    slot: Slot
    tokens: TokenIds


class Rows:
    """Room for a batch of several sequences, made once."""

    def __init__(self, most: int, sequences: int) -> None:
        self._tokens, self._places, self._wanted = (Token * most)(), (c_int32 * most)(), (c_int8 * most)()
        self._counts = (c_int32 * most)(*([1] * most))
        self._numbers = (c_int32 * sequences)(*range(sequences))
        self._sequences = (c_void_p * most)()

    def fill(self, parts: Sequence[Part]) -> tuple[Batch, list[int]]:
        """The batch, and for each part the row after which its next token is known; an output is asked for there."""
        at, outputs = 0, []
        for part in parts:
            begin, at = at, at + len(part.tokens)
            size, place = at - begin, len(part.slot.cached)
            self._tokens[begin:at] = [*part.tokens]
            self._places[begin:at] = [*range(place, place + size)]
            address = ctypes.addressof(self._numbers) + part.slot.number * ctypes.sizeof(c_int32)
            self._sequences[begin:at] = [address] * size
            self._wanted[begin:at] = [*itertools.repeat(0, size - 1), 1]
            outputs.append(at - 1)
        batch = Batch(
            n_tokens=at,
            token=self._tokens,
            pos=self._places,
            n_seq_id=ctypes.addressof(self._counts),
            seq_id=ctypes.addressof(self._sequences),
            logits=self._wanted,
        )
        return batch, outputs


class LlamaSlots(LlamaSession):
    """One model, one context, as many sequences as answers may be written at a time. Any thread may ask."""

    def __init__(self, library: Library, path: Path, options: LoadOptions, flash_attention: bool = True) -> None:
        if options.parallel > options.batch:
            raise UsageError(f"{options.parallel} answers at a time do not fit a batch of {options.batch} tokens")
        if options.lookup:
            raise UsageError("prompt lookup guesses for one answer at a time only", "Leave out --lookup or --parallel.")
        if options.state is not None:
            raise UsageError("states of system prompts are kept for one answer at a time only")
        super().__init__(library, path, options, flash_attention)
        self.parallel = options.parallel
        self._slots = [Slot(number) for number in range(options.parallel)]
        self._running: list[Stream] = []
        self._waiting: list[Stream] = []
        self._evaluating: Sequence[Stream] = ()
        self._ended = itertools.count(1)
        self._closing = False
        self._changed = threading.Condition()
        self._rows = Rows(options.batch, options.parallel)
        library.llama_set_abort_callback(self._ctx, abort_function(), ctypes.addressof(self._flag))
        self._thread = threading.Thread(target=self._run, name="edgeft-batches", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._ctx is not None and hasattr(self, "_thread"):
            with self._changed:
                self._closing = True
                self._flag[0] = b"\1"
                self._changed.notify_all()
            self._thread.join()
        super().close()

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        raise UsageError("a session of several answers at a time does not score", "Load the model with parallel 1.")

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        """Raises: UsageError while answers are being written: they share the weights."""
        with self._changed:
            self._changed.wait_for(lambda: all(not one.left for one in [*self._running, *self._waiting]))
            if self._running or self._waiting:
                raise UsageError("adapters cannot be changed while answers are being written")
            super().set_adapters(adapters)
            for slot in self._slots:
                slot.cached = []

    # --- Threads that read ----------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        self._check_prompt(prompt)
        cancel = Cancel() if cancel is None else cancel  # an unthrown switch is false
        stream = Stream(prompt, sampling, self._sampler(sampling, prompt), cancel)
        with cancel.calls(self._look_again):
            with self._changed:
                if self._closing:
                    self._lib.llama_sampler_free(stream.sampler)
                    raise self._closed()
                self._waiting.append(stream)
                self._changed.notify_all()
            try:
                while True:
                    step = stream.out.get()
                    if isinstance(step, EdgeftError):
                        raise step
                    yield step
                    if step.usage:
                        return
            finally:
                stream.left = True
                self._look_again()

    def _look_again(self) -> None:
        """Somebody left: a batch that nobody waits for any more is not finished."""
        with self._changed:
            if self._evaluating and all(stream.over for stream in self._evaluating):
                self._flag[0] = b"\1"
            self._changed.notify_all()

    # --- The thread that computes -----------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            try:
                if self._admitted():
                    self._step()
            except Exception as error:  # the border of a thread: readers would wait for ever
                known = error if isinstance(error, EdgeftError) else ModelError(f"{type(error).__name__}: {error}")
                for stream in list(self._running):
                    self._end(stream, known)
        for stream in [*self._running, *self._waiting]:
            self._end(stream, self._closed())

    def _closed(self) -> ModelError:
        return ModelError(f"the session on {self._path} is closed")

    def _admitted(self) -> bool:
        """Wait until there is something to compute, and give free slots to those who wait. False at the end."""
        with self._changed:
            while not self._closing:
                for stream in [one for one in [*self._running, *self._waiting] if one.over]:
                    self._end(stream)
                while self._waiting and any(slot.free for slot in self._slots):
                    self._begin_in_slot(self._waiting[0])
                if self._running:
                    self._evaluating = tuple(self._running)
                    self._flag[0] = b"\0"
                    return True
                self._changed.wait()
        return False

    def _begin_in_slot(self, stream: Stream) -> None:
        """The first who waits, in the free slot that has most of its prompt."""
        free = [slot for slot in self._slots if slot.free]
        prompt = stream.prompt[:-1]
        slot = max(free, key=lambda one: (len(common(one.cached, prompt)), -one.left))
        self._cut(slot, len(common(slot.cached, prompt)))
        slot.free, stream.slot = False, slot
        stream.answer.reused = len(slot.cached)
        stream.pending = stream.prompt[len(slot.cached) :]
        self._running.append(self._waiting.pop(0))

    def _cut(self, slot: Slot, length: int) -> None:
        """Keep so many tokens of a slot, or none: recurrent models cannot forget a part."""
        if not self._lib.llama_memory_seq_rm(self._memory, slot.number, length, -1):
            self._lib.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
            length = 0
        slot.cached = slot.cached[:length]

    def _end(self, stream: Stream, error: EdgeftError | None = None) -> None:
        """The last word to a reader; what its slot has cached stays for the next."""
        with self._changed:
            (self._running if stream.slot else self._waiting).remove(stream)
            self._lib.llama_sampler_free(stream.sampler)
            if stream.slot is not None:
                stream.slot.free, stream.slot.left = True, next(self._ended)
            stream.out.put(error or stream.answer.last())
            self._changed.notify_all()

    def _step(self) -> None:
        """One batch: a token of every answer that is being written, and as much of the new prompts as has room."""
        parts = self._parts(self._evaluating)
        batch, outputs = self._rows.fill(parts)
        code = self._lib.llama_decode(self._ctx, batch)
        with self._changed:
            self._evaluating = ()
        if code:
            for part in parts:  # as it was before
                self._cut(part.slot, len(part.slot.cached))
            if code != _ABORTED:
                raise ModelError(f"llama.cpp could not evaluate {batch.n_tokens} tokens (code {code}){self._said()}")
            return
        for part, row in zip(parts, outputs, strict=True):
            stream = part.stream
            part.slot.cached += part.tokens
            stream.pending = stream.pending[len(part.tokens) :]
            if not stream.pending and not stream.over:
                self._choose(stream, part.slot, row)

    def _parts(self, streams: Sequence[Stream]) -> list[Part]:
        """In the order of the slots: llama.cpp computes neighbours together."""
        writing = sum(len(stream.pending) == 1 for stream in streams)
        room = min(self._batch - writing, _BESIDE) if writing else self._batch
        parts = []
        for stream in streams:
            assert stream.slot is not None
            tokens = stream.pending
            if len(tokens) > 1:
                tokens = tokens[:room]
                room -= len(tokens)
            if tokens:
                parts.append(Part(stream, stream.slot, tokens))
        return sorted(parts, key=lambda part: part.slot.number)

    def _choose(self, stream: Stream, slot: Slot, row: int) -> None:
        token = self._lib.llama_sampler_sample(stream.sampler, self._ctx, row)
        answer = stream.answer
        if answer.sampled(self._lib.llama_vocab_is_eog(self._vocab, token)):
            logprobs = self._logprobs(token, stream.sampling.top_logprobs, row)
            full = len(slot.cached) >= self.context
            stream.out.put(answer.add(token, self._piece(token), logprobs, full))
            stream.pending = [token]
