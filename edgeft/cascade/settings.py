"""`cascade.toml`: who answers, when the cloud is asked, what it may cost and what may leave the device."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgeft.chat_completions import Endpoint, parse_endpoint
from edgeft.errors import ConfigError, EdgeftError
from edgeft.paths import home

SCHEMA = 1
POLICIES = (
    "local-only",
    "cloud-only",
    "on-error",
    "quantile",
    "margin",
    "entropy",
    "self-consistency",
    "p-true",
    "learned",
    "boosted",
)
MID_STREAM = ("finish-locally", "restart-locally", "stop")


@dataclass(frozen=True)
class Local:
    model: str
    runtime: str = "auto"
    context: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Cloud:
    """One endpoint; prices per 1,000 tokens."""

    name: str
    url: str
    model: str = ""
    key_env: str = "EDGEFT_CLOUD_KEY"
    key_keyring: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    connect_s: float = 3.0
    first_token_s: float = 20.0
    idle_s: float = 15.0
    total_s: float = 120.0
    retries: int = 2
    concurrency: int = 4

    def cost(self, prompt: int, completion: int) -> float:
        return (prompt * self.price_in + completion * self.price_out) / 1000

    def endpoint(self) -> Endpoint:
        """Raises: UsageError for a URL that is none, or has a key in it."""
        return dataclasses.replace(
            parse_endpoint(self.url),
            model=self.model or parse_endpoint(self.url).model,
            key_env=self.key_env,
            secret=_from_keyring(self.key_keyring, self.name),
            connect_s=self.connect_s,
            first_token_s=self.first_token_s,
            idle_s=self.idle_s,
            total_s=self.total_s,
        )


@dataclass(frozen=True)
class PolicySettings:
    kind: str = "on-error"
    threshold: float = 0.0
    quantile: float = 0.1
    samples: int = 3
    judge_tokens: int = -1
    calibration: str = ""
    embedder: str = ""
    mid_stream: str = "finish-locally"


@dataclass(frozen=True)
class BudgetSettings:
    """Limits; 0 is none."""

    currency: str = "USD"
    request_money: float = 0.0
    day_money: float = 0.0
    month_money: float = 0.0
    request_tokens: int = 0
    day_tokens: int = 0
    month_tokens: int = 0


@dataclass(frozen=True)
class PrivacySettings:
    redact: bool = True
    local_only: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResilienceSettings:
    failures: int = 3
    open_s: float = 30.0
    offline_s: float = 20.0
    retry_wait_s: float = 4.0
    queue_s: float = 2.0
    hedge_percentile: float = 0.0
    hedge_s: float = 2.0


@dataclass(frozen=True)
class CacheSettings:
    expire_s: float = 0.0
    entries: int = 1000
    near: float = 0.0
    embedder: str = ""


@dataclass(frozen=True)
class AuditSettings:
    enabled: bool = True
    file: str = ""
    max_mb: float = 20.0


@dataclass(frozen=True)
class Settings:
    path: Path
    local: Local
    cloud: tuple[Cloud, ...] = ()
    judge: Cloud | None = None
    """Grades answers for `edgeft cascade tune --judge model`; never answers itself."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    resilience: ResilienceSettings = field(default_factory=ResilienceSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)

    def beside(self, name: str) -> Path:
        """A file that is named relative to the settings."""
        return self.path.parent / Path(name).expanduser()

    @property
    def audit_file(self) -> Path:
        return self.beside(self.audit.file) if self.audit.file else home() / "cascade" / "audit.sqlite"

    @property
    def spending_file(self) -> Path:
        """Kept even where nothing is audited: a budget must outlive the process."""
        return self.audit_file.with_name("spending.sqlite")


SECTIONS: dict[str, type[Any]] = {
    "policy": PolicySettings,
    "budget": BudgetSettings,
    "privacy": PrivacySettings,
    "resilience": ResilienceSettings,
    "cache": CacheSettings,
    "audit": AuditSettings,
}

Section = TypeVar("Section")


def is_cascade(reference: str) -> bool:
    """Whether a model's name is that of a cascade: a TOML file that is no endpoint."""
    path = Path(reference).expanduser()
    return path.name.endswith(".toml") and not path.name.endswith(".endpoint.toml") and path.is_file()


def read_settings(path: Path) -> Settings:
    """Raises: ConfigError for what cannot be read, is unknown, or cannot be."""
    path = path.expanduser().absolute()
    try:
        return parse_settings(path.read_text(encoding="utf-8"), path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "edgeft cascade init writes a new one.") from error


def parse_settings(text: str, path: Path) -> Settings:
    """The settings in a text that is, or would be, in a file. Raises: ConfigError."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}", "edgeft cascade init writes a new one.") from error
    if document.pop("schema", SCHEMA) != SCHEMA:
        raise ConfigError(f"{path}: this edgeft reads schema {SCHEMA}")
    known = {"local", "cloud", "judge", *SECTIONS}
    for name in document:
        if name not in known:
            raise _unknown(str(path), name, known)
    clouds = document.get("cloud", [])
    if not isinstance(clouds, list):
        raise ConfigError(f"{path}: endpoints are written as [[cloud]], with two brackets")
    sections = {name: _section(kind, document.get(name, {}), f"{path}: {name}") for name, kind in SECTIONS.items()}
    local = _section(Local, document.get("local", {}), f"{path}: local")
    settings = Settings(
        path,
        local,
        tuple(_section(Cloud, entry, f"{path}: cloud {n}") for n, entry in enumerate(clouds, 1)),
        _section(Cloud, document["judge"], f"{path}: judge") if "judge" in document else None,
        **sections,
    )
    _check(settings)
    return settings


def _section(kind: type[Section], table: Any, where: str) -> Section:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table")
    fields = {each.name.replace("_", "-"): each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for name, value in table.items():
        if name not in fields:
            raise _unknown(where, name, set(fields))
        values[fields[name].name] = _typed(value, str(fields[name].type), f"{where}.{name}")
    for name, each in fields.items():
        if each.default is dataclasses.MISSING and each.name not in values:
            raise ConfigError(f"{where} lacks {name}")
    return kind(**values)


def _typed(value: Any, kind: str, where: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if type(value).__name__ != kind:
        raise ConfigError(f"{where} must be {kind.replace('tuple[str, ...]', 'a list of texts')}, not {value!r}")
    if kind == "float" and not 0 <= value < float("inf") and "threshold" not in where:
        raise ConfigError(f"{where} must be at least 0 and finite, not {value!r}")
    return value


def _unknown(where: str, name: str, known: set[str]) -> ConfigError:
    if name in ("key", "api-key", "secret", "token"):
        hint = "Keys are never in the file: key-env names an environment variable, key-keyring an entry of the keyring."
        return ConfigError(f"{where}: {name} has no place here", hint)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(sorted(known))}."
    return ConfigError(f"{where}: unknown key {name}", hint)


def _check(settings: Settings) -> None:
    policy, where = settings.policy, settings.path
    for value, choices, name in ((policy.kind, POLICIES, "kind"), (policy.mid_stream, MID_STREAM, "mid-stream")):
        if value not in choices:
            raise ConfigError(f"{where}: policy.{name} must be one of {', '.join(choices)}, not {value!r}")
    if not 0 <= policy.quantile <= 1:
        raise ConfigError(f"{where}: policy.quantile must lie between 0 and 1")
    if policy.judge_tokens < -1 or policy.samples < 2:
        raise ConfigError(f"{where}: policy.judge-tokens is at least -1, policy.samples at least 2")
    if policy.kind in ("self-consistency", "p-true") and policy.judge_tokens != -1:
        raise ConfigError(f"{where}: {policy.kind} judges whole answers: judge-tokens must be -1")
    if policy.kind in ("learned", "boosted") and not policy.calibration:
        raise ConfigError(
            f"{where}: the {policy.kind} policy needs a calibration", f"edgeft cascade tune {where} --data …"
        )
    names = [cloud.name for cloud in settings.cloud]
    if len(set(names)) < len(names) or "local" in names or "" in names:
        raise ConfigError(f"{where}: endpoints need names of their own, and none may be called local")
    for cloud in (*settings.cloud, *([settings.judge] if settings.judge else [])):
        if cloud.concurrency < 1 or cloud.retries < 0:
            raise ConfigError(f"{where}: {cloud.name}: concurrency is at least 1, retries at least 0")
        try:
            parse_endpoint(cloud.url)
        except EdgeftError as error:
            raise ConfigError(f"{where}: {cloud.name}: {error.message}", error.hint) from error
    if settings.resilience.hedge_percentile >= 100:
        raise ConfigError(f"{where}: resilience.hedge-percentile must be below 100")
    if not 0 <= settings.cache.near <= 1 or (settings.cache.near and not settings.cache.embedder):
        raise ConfigError(f"{where}: cache.near lies between 0 and 1 and needs cache.embedder, a folder")
    for pattern in (*settings.privacy.local_only, *settings.privacy.secrets):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: privacy: {pattern!r} is no regular expression: {error}") from error


def _from_keyring(service: str, name: str) -> str:
    """The key stored by `keyring set SERVICE NAME`; "" when none is named."""
    if not service:
        return ""
    from edgeft.errors import require

    keyring = require("keyring", "cascade")
    try:
        return str(keyring.get_password(service, name) or "")
    except Exception as error:  # every system's store has errors of its own
        raise ConfigError(f"the keyring cannot be read: {type(error).__name__}") from None


TEMPLATE = """\
# A cascade: answered on this device, by the cloud only when it pays.
# `edgeft cascade tune` chooses the policy's threshold; docs/cascade.md has every key.
schema = 1

[local]
model = {model}            # anything `edgeft run` takes
# runtime = "auto"
# context = 0                # tokens; 0: the model's own, at most 4096

# Endpoints in the order in which they are asked. Any server that speaks chat completions.
[[cloud]]
name = "cloud"
url = {url}
model = {name}
key-env = "EDGEFT_CLOUD_KEY" # the key is in this environment variable, never in this file
# key-keyring = "edgeft"     # or in the system's keyring: `keyring set edgeft cloud`
price-in = 0.0               # money per 1,000 prompt tokens
price-out = 0.0              # and per 1,000 tokens of the answer
# connect-s = 3.0
# first-token-s = 20.0
# idle-s = 15.0
# total-s = 120.0
# retries = 2
# concurrency = 4

# [judge]                    # a model that grades answers: `edgeft cascade tune --judge model`; keys as above
# name = "judge"
# url = "https://api.example.com/v1#strong-model"

[policy]
kind = "quantile"            # {policies}
threshold = 1.6              # the cloud is asked when the policy's risk is above this
quantile = 0.1               # of the local answer's token log-probabilities; the risk is its negative
judge-tokens = -1            # tokens that are judged before any is shown; -1: the whole answer, 0: none
mid-stream = "finish-locally" # or "restart-locally", "stop": when the cloud breaks off in the middle
# calibration = "calibration.json"
# embedder = "potion-base-8M" # folder of a static embedding model, for tuning to what prompts are about (extra `near`)

[budget]                     # 0: no limit. When one is reached, the device answers.
currency = "USD"
request-money = 0.0
day-money = 0.5
month-money = 5.0
request-tokens = 0
day-tokens = 0
month-tokens = 0

[privacy]
redact = true                # personal data is replaced before sending and put back in the answer (extra `pii`)
local-only = []              # regular expressions; a conversation that matches one never leaves the device
topics = []                  # words; the same for a conversation that has one of them
secrets = []                 # regular expressions of what is replaced besides personal data

[resilience]
failures = 3                 # in a row, after which an endpoint is left alone
open-s = 30.0                # for so long; then one request tries
offline-s = 20.0             # how long "no connection" is remembered
retry-wait-s = 4.0           # longest wait before a retry
queue-s = 2.0                # longest wait for a free connection
# hedge-percentile = 95.0    # the next endpoint is asked, too, when the first is later than so many; 0: never
# hedge-s = 2.0              # what counts as late while fewer than 20 answers are known

[cache]
expire-s = 0.0               # how long answers of the cloud are reused for the same request; 0: not at all
# near = 0.95                # and for one whose question is so near (cosine), all else being the same; 0: not at all
# embedder = "potion-base-8M" # folder of the static embedding model that says how near (extra `near`)

[audit]
enabled = true               # what left the device, why, and what it cost; no text
max-mb = 20.0
"""
