"""One answer after another: from the device where it is good enough, else from the cloud where it may be asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.artifact import digest_of
from edgeft.cascade.audit import AuditLog
from edgeft.cascade.budget import Budget
from edgeft.cascade.cache import AnswerCache, Asked
from edgeft.cascade.calibration import Calibration, read_calibration
from edgeft.cascade.cloud import Clouds, Unanswered
from edgeft.cascade.device import DeviceAnswer, p_true, question_of, samples
from edgeft.cascade.embedder import Embedder
from edgeft.cascade.features import loggable
from edgeft.cascade.policies import Evidence, Policy, make_policy
from edgeft.cascade.privacy import Guard
from edgeft.cascade.settings import PolicySettings, Settings, read_settings
from edgeft.cascade.types import LOCAL, By, CascadeDelta, Record
from edgeft.chat import Cancel, Message, Sampling
from edgeft.errors import EdgeftError, Unreachable
from edgeft.plugins import LoadOptions
from edgeft.progress import Progress
from edgeft.sessions import Opened, open_session

if TYPE_CHECKING:
    from edgeft.cascade.embedder import Vector

Tools = Sequence[Mapping[str, Any]]


class Cascade:
    """A local model and its endpoints. Any thread may ask; the device answers one at a time."""

    def __init__(self, settings: Settings, opened: Opened) -> None:
        """Takes over the session. Raises: ConfigError, MissingDependency, WriteError."""
        self.settings, self.opened = settings, opened
        self.guard = Guard(settings.privacy)
        self.budget = Budget(settings.budget, settings.spending_file)
        self.audit = AuditLog(settings.audit_file, settings.audit)
        self.clouds = Clouds(settings, self.budget, self.guard)
        near = settings.cache.near > 0 and settings.cache.expire_s > 0
        load = functools.cache(Embedder)  # once, where both name the same folder
        embed = load(settings.beside(settings.cache.embedder)).vector if near else None
        self.cache = AnswerCache(settings.cache, embed=embed)
        own = settings.policy.embedder
        self.embedder: Embedder | None = load(settings.beside(own)) if own else None
        self.device = threading.Lock()
        self.stale = ""
        """Why the calibration does not hold; the device then answers unless it cannot."""
        self.policy, self.threshold = self._calibrated()

    @classmethod
    def open(cls, path: Path, progress: Progress | None = None, *, calibrated: bool = True) -> Cascade:
        """A cascade by its settings.

        Args:
            calibrated: False leaves the calibration aside, which is about to be made.

        Raises:
            ConfigError; what `open_session` raises.
        """
        settings = read_settings(path)
        if not calibrated:
            kept = dataclasses.replace(settings.policy, kind="on-error", calibration="")
            settings = dataclasses.replace(settings, policy=kept)
        local = settings.local
        threads = local.threads or None  # a limit on cores holds for the prompt as well
        options = LoadOptions(context=local.context or None, threads=threads, threads_batch=threads)
        beside = settings.beside(local.model)
        opened = open_session(str(beside) if beside.exists() else local.model, local.runtime, options, progress)
        try:
            return cls(settings, opened)
        except BaseException:
            opened.session.close()
            raise

    def _calibrated(self) -> tuple[Policy, float]:
        policy = self.settings.policy
        calibration: Calibration | None = None
        if policy.calibration:
            calibration = read_calibration(self.settings.beside(policy.calibration))
            self.stale = calibration.stale(self.artifact_digest, policy.judge_tokens, self.embedder_digest)
            if not self.stale and calibration.policy != policy.kind:
                self.stale = f"it is for the policy {calibration.policy}, not {policy.kind}"
        if self.stale:
            return make_policy(PolicySettings(kind="on-error"), None), 0.0
        return make_policy(policy, calibration), calibration.threshold if calibration else policy.threshold

    @functools.cached_property
    def artifact_digest(self) -> str:
        """Hex SHA-256 of the local model; of model and adapters where there are some. Read once: files are large."""
        digests = [digest_of(each.path) + f"*{each.scale}" for each in self.opened.adapters]
        path = self.opened.artifact.path
        own = digest_of(path) if path.exists() else hashlib.sha256(str(path).encode()).hexdigest()
        return hashlib.sha256("\n".join([own, *digests]).encode()).hexdigest() if digests else own

    @property
    def embedder_digest(self) -> str:
        return self.embedder.digest if self.embedder else ""

    def vector(self, messages: Sequence[Message]) -> Vector | None:
        """Of the last message, by the policy's embedder; None without one."""
        return self.embedder.vector(question_of(messages)) if self.embedder else None

    def __enter__(self) -> Cascade:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.clouds.close()
        with self.device:
            self.opened.session.close()
        self.audit.close()
        self.budget.close()

    def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        cancel: Cancel | None = None,
        tools: Tools | None = None,
        by: By = "policy",
    ) -> Iterator[CascadeDelta]:
        """Stream one answer; the last delta has the record. It may be left at any point.

        Args:
            by: "cloud" asks it whatever the policy says, and the device when it does not answer; what a privacy rule
                keeps on the device stays there.

        Raises:
            EdgeftError: neither the device nor the cloud could answer; the audit log has it as refused.
        """
        turn = _Turn(self, messages, sampling or Sampling(), Cancel() if cancel is None else cancel, tools, by)
        record, began = turn.record, time.monotonic()
        record.finish = "cancel"  # until it ends in another way
        try:
            for delta in turn.deltas():
                if delta.text:
                    if record.ttft_ms is None:
                        record.ttft_ms = round(1000 * (time.monotonic() - began), 1)
                    record.author = delta.author
                    if record.authors[-1:] != [delta.author]:
                        record.authors.append(delta.author)
                yield delta
        except EdgeftError as error:
            record.finish, record.error = "refused", error.message
            raise
        finally:
            record.total_ms = round(1000 * (time.monotonic() - began), 1)
            self.audit.add(record)
        yield CascadeDelta("", record.author, record=record)


class _Turn:
    """One request on its way."""

    def __init__(
        self,
        cascade: Cascade,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: Cancel,
        tools: Tools | None,
        by: By = "policy",
    ) -> None:
        self.cascade, self.messages, self.sampling, self.cancel, self.tools = cascade, messages, sampling, cancel, tools
        self.by = by
        self.record = Record(uuid.uuid4().hex, time.time())

    def deltas(self) -> Iterator[CascadeDelta]:
        cascade, kind = self.cascade, self.cascade.policy.name
        pinned = cascade.guard.pinned(self.messages) or ("tools are the device's" if self.tools else "")
        if pinned:
            yield from self._from_device(f"stays on the device: {pinned}")
        elif self.by == "device":
            yield from self._from_device("the device was asked for")
        elif self.by == "cloud":
            yield from self._from_cloud("the cloud was asked for", None)
        elif kind == "cloud-only":
            yield from self._from_cloud("cloud only", None)
        elif kind in ("local-only", "on-error") or cascade.settings.policy.judge_tokens == 0:
            yield from self._unjudged(f"stale calibration: {cascade.stale}" if cascade.stale else kind)
        else:
            yield from self._judged()

    # --- The device ---------------------------------------------------------------

    def _from_device(self, reason: str, restart: bool = False, prefix: str = "") -> Iterator[CascadeDelta]:
        """The device's answer as it is made; with `prefix`, what follows on it."""
        self.record.reason = reason
        with contextlib.closing(self._device_answer(prefix)) as answer:
            for text in answer.texts():
                yield CascadeDelta(text, LOCAL, reason, restart)
                reason, restart = "", False
        self._ended(answer)

    def _device_answer(self, prefix: str = "") -> DeviceAnswer:
        cascade = self.cascade
        return DeviceAnswer(
            cascade.device, cascade.opened.session, self.messages, self.sampling, self.cancel, self.tools, prefix
        )

    def _ended(self, answer: DeviceAnswer) -> None:
        usage, record = answer.usage, self.record
        record.local_tokens += answer.count
        if usage is not None:
            record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            record.finish = usage.finish_reason
        if record.confidence is None:
            record.confidence = answer.confidence

    def _unjudged(self, reason: str) -> Iterator[CascadeDelta]:
        shown = False
        try:
            for delta in self._from_device(reason):
                shown = shown or bool(delta.text)
                yield delta
        except EdgeftError as error:
            if shown or self.cascade.policy.name == "local-only":
                raise
            yield from self._from_cloud(f"the device could not: {type(error).__name__}", None, error)

    def _judged(self) -> Iterator[CascadeDelta]:
        limit = self.cascade.settings.policy.judge_tokens
        error: EdgeftError | None = None
        buffer, whole, reason = "", False, ""
        with contextlib.closing(self._device_answer()) as answer:
            try:
                buffer = answer.read(limit)
                whole = answer.usage is not None
                keep, reason = self._keeps(answer, buffer)
            except EdgeftError as raised:
                keep, error, reason = False, raised, f"the device could not: {type(raised).__name__}"
            if keep or (self.cancel and error is None):
                self.record.reason = reason
                yield CascadeDelta(buffer, LOCAL, reason)
                for text in answer.texts():
                    yield CascadeDelta(text)
                self._ended(answer)
                return
        self._ended(answer)
        yield from self._from_cloud(reason, buffer if whole else None, error)

    def _keeps(self, answer: DeviceAnswer, text: str) -> tuple[bool, str]:
        cascade, record = self.cascade, self.record
        found = answer.features()
        record.features = loggable(found)
        record.confidence = answer.confidence
        if not answer.tokens and not cascade.policy.extra:
            return True, "the runtime gives no probabilities"
        evidence = self._evidence(answer, text, found)
        risk = cascade.policy.risk(evidence)
        record.risk, record.threshold = risk, cascade.threshold
        keep = risk <= cascade.threshold
        return keep, f"{cascade.policy.name}: risk {risk:.3g} {'at most' if keep else 'above'} {cascade.threshold:.3g}"

    def _evidence(self, answer: DeviceAnswer, text: str, found: Mapping[str, float]) -> Evidence:
        evidence = Evidence(text, answer.tokens, found, vector=self.cascade.vector(self.messages))
        session, extra = self.cascade.opened.session, self.cascade.policy.extra
        if extra == "samples":
            count = self.cascade.settings.policy.samples
            return dataclasses.replace(
                evidence, samples=samples(session, self.messages, self.sampling, count, self.cancel)
            )
        if extra == "p-true":
            return dataclasses.replace(evidence, p_true=p_true(session, self.messages, text, self.cancel))
        return evidence

    # --- The cloud ------------------------------------------------------------------

    def _from_cloud(self, reason: str, kept: str | None, error: EdgeftError | None = None) -> Iterator[CascadeDelta]:
        """The cloud's answer, or the device's where none comes.

        Args:
            kept: the device's whole answer, when it has one already; `error`: why it can have none.
        """
        asked = self._asked()
        if (found := self.cascade.cache.get(asked)) is not None:
            near = f", to a question near this one ({found.similarity:.3f})" if found.similarity < 1 else ""
            self.record.reason, self.record.cached, self.record.finish = f"{reason}; from the cache{near}", True, "stop"
            yield CascadeDelta(found.text, found.author, self.record.reason)
            return
        shown, said, author = "", reason, ""
        self.record.reason = reason
        try:
            pieces = self.cascade.clouds.ask(self.messages, self.sampling, self.cancel, self.record)
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for author, text in pieces:
                    yield CascadeDelta(text, author, said)
                    shown, said = shown + text, ""
            if shown and not self.cancel:
                self.cascade.cache.put(asked, author, shown, bool(self.record.redacted))
        except Unanswered as failure:
            if not self.cancel:
                yield from self._instead(failure, reason, kept, shown, error)

    def _instead(
        self, failure: Unanswered, reason: str, kept: str | None, shown: str, error: EdgeftError | None
    ) -> Iterator[CascadeDelta]:
        why = f"{reason}; the cloud did not answer ({failure.outcome})"
        if shown:
            yield from self._broken(failure, reason, kept, shown)
        elif error is not None:
            raise Unreachable(
                f"no answer: {error.message}; the cloud did not answer ({failure.outcome})", error.hint
            ) from error
        elif kept is not None:
            self.record.reason = why
            yield CascadeDelta(kept, LOCAL, why)
        else:
            yield from self._from_device(why)

    def _broken(self, failure: Unanswered, reason: str, kept: str | None, shown: str) -> Iterator[CascadeDelta]:
        """The cloud broke off after text was shown: what the settings say happens, and is said."""
        mode = self.cascade.settings.policy.mid_stream
        why = f"{reason}; the cloud broke off ({failure.outcome})"
        if mode == "stop":
            self.record.reason, self.record.finish, self.record.error = why, "broken", failure.outcome
            yield CascadeDelta("", reason=why)
        elif mode == "restart-locally" and kept is not None:
            self.record.reason = why
            yield CascadeDelta(kept, LOCAL, why, restart=True)
        else:
            restart = mode == "restart-locally"
            try:
                yield from self._from_device(why, restart, "" if restart else shown)
            except EdgeftError as error:
                self.record.finish, self.record.error = "broken", f"{failure.outcome}; {error.message}"
                yield CascadeDelta("", reason=f"{why}; the device could not go on")

    def _asked(self) -> Asked:
        """For the cache: the request itself, down to the seed."""
        messages, how = [dict(message) for message in self.messages], dataclasses.asdict(self.sampling)
        last = messages[-1] if messages else {}
        question = last.get("content")
        if not isinstance(question, str) or last.get("role") != "user":
            return Asked(_digest([messages, how]), _digest([messages, how]), "")
        scope = [messages[:-1], {**last, "content": ""}, how]
        return Asked(_digest([messages, how]), _digest(scope), question)


def _digest(request: Any) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
