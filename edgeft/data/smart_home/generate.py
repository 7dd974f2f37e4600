"""Make the smart-home data set: spoken-style commands and the one JSON call each of them means.

    python -m edgeft.data.smart_home.generate --out DIR

The same files come out on every machine: one fixed seed, and `random.Random.random` alone, whose sequence Python
guarantees between versions.

Held out means unseen: templates, (device, room) pairs, whole rooms, colours, numbers of each kind and minutes of the
clock each belong to one split. Every held-out command holds a template *and* a value or pair that training never saw.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from edgeft.data.smart_home import refusals
from edgeft.data.smart_home.vocabulary import (
    COLOURS,
    COMMON_ROOMS,
    HELD_OUT,
    NAMES,
    PREFIXES,
    RANGES,
    ROOMLESS,
    ROOMS,
    SPLITS,
    SUFFIXES,
    SYSTEM,
    TEMPLATES,
    VERBS,
    Split,
)
from edgeft.paths import write_json, write_text

SEED = 20240711
SIZES: Mapping[Split, int] = {"train": 1900, "valid": 150, "test": 200}
NAME, LICENCE = "smart-home", "Apache-2.0"

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """What a command means. Absent parts are None; an unsupported request has nothing but its action."""

    device: str | None
    action: str
    value: str | None = None
    """Digits and unit: 40%, 21C, 70F, 10m, 45s, 2h; or a colour."""
    room: str | None = None
    """The room as spoken, "all" for the whole house."""
    time: str | None = None
    """Clock time HH:MM, or sunset, sunrise; +20m and +2h from now."""

    def json(self) -> str:
        return json.dumps(self.__dict__, separators=(",", ":"))


UNSUPPORTED = Call(None, "unsupported")


@dataclass(frozen=True)
class Command:
    text: str
    call: Call
    template: str
    """Intent and the sentence before its slots were filled."""
    core: str
    """The text without politeness."""


class Dice:
    """Choices from `random()` alone."""

    def __init__(self, seed: str) -> None:
        self._next = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._next() * len(items))]


# --- Values: what is said, and what it means --------------------------------------

_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
_ONES, _TENS = _WORDS.split()[:20], ["", "", *_WORDS.split()[20:]]


def number_words(number: int, joint: str = " ") -> str:
    """English words of 0..100."""
    if number == 100:
        return "one hundred"
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (joint + _ONES[ones] if ones else "")


def numbers(kind: str, split: Split) -> tuple[int, ...]:
    """The numbers of a kind that belong to a split."""
    held_out = HELD_OUT[kind]
    if split != "train":
        return held_out[split]
    return tuple(n for n in RANGES[kind] if not any(n in group for group in held_out.values()))


def spoken(number: int, dice: Dice) -> str:
    if number > 100 or dice.chance(0.6):
        return str(number)
    return number_words(number, dice.pick((" ", "-")))


def percent(split: Split, dice: Dice) -> tuple[str, str]:
    number = dice.pick(numbers("percent", split))
    if dice.chance(0.2):
        return f"{number}%", f"{number}%"
    return f"{spoken(number, dice)} percent", f"{number}%"


def degrees(kind: str) -> Callable[[Split, Dice], tuple[str, str]]:
    """Degrees with no scale named are Celsius."""

    def make(split: Split, dice: Dice) -> tuple[str, str]:
        if dice.chance(0.35):
            number = dice.pick(numbers(kind.replace("celsius", "fahrenheit"), split))
            return f"{spoken(number, dice)} {dice.pick(('degrees fahrenheit', 'fahrenheit'))}", f"{number}F"
        number = dice.pick(numbers(kind, split))
        return f"{spoken(number, dice)} {dice.pick(('degrees', 'degrees', 'degrees celsius'))}", f"{number}C"

    return make


def duration(split: Split, dice: Dice) -> tuple[str, str]:
    unit = dice.pick(("minutes", "minutes", "seconds", "hours"))
    number = dice.pick(numbers("hours" if unit == "hours" else "minutes", split))
    return f"{spoken(number, dice)} {unit}", f"{number}{unit[0]}"


def colour(split: Split, dice: Dice) -> tuple[str, str]:
    name = dice.pick(COLOURS[split])
    return name, name


def moment(split: Split, dice: Dice) -> tuple[str, str]:
    """A time phrase: 24-hour clock, spoken clock, or from now."""
    if dice.chance(0.35):
        return _from_now(split, dice)
    if dice.chance(0.12):
        name = dice.pick(("noon", "midnight", "sunset", "sunrise"))
        return f"at {name}", {"noon": "12:00", "midnight": "00:00"}.get(name, name)
    minute = _minute(split, dice)
    if dice.chance(0.25):
        hour = dice.pick((*range(10), *range(13, 24)))
        return f"at {hour:02}:{minute:02}", f"{hour:02}:{minute:02}"
    hour = dice.pick(range(1, 12))
    clock = _clock(hour, minute, dice)
    half, shift = dice.pick((("am", 0), ("pm", 12), *_day_part(hour)))
    return f"at {clock} {half}", f"{hour + shift:02}:{minute:02}"


def _from_now(split: Split, dice: Dice) -> tuple[str, str]:
    if split == "train" and dice.chance(0.2):
        fixed = (("in an hour", "+1h"), ("in half an hour", "+30m"), ("in a quarter of an hour", "+15m"))
        return dice.pick(fixed)
    unit = dice.pick(("minutes", "minutes", "hours"))
    number = dice.pick(numbers(unit, split))
    said = f"{spoken(number, dice)} {unit}"
    return dice.pick((f"in {said}", f"in {said}", f"{said} from now")), f"+{number}{unit[0]}"


def _minute(split: Split, dice: Dice) -> int:
    if split == "train" and dice.chance(0.4):
        return dice.pick((0, 0, 0, 5, 10, 15, 15, 20, 30, 30, 40, 45))
    return dice.pick(numbers("clock-minute", split))


def _clock(hour: int, minute: int, dice: Dice) -> str:
    said = dice.pick((str(hour), number_words(hour)))
    if minute == 0:
        return dice.pick((said, f"{said} o'clock"))
    if minute in (15, 30) and dice.chance(0.4):
        return f"{'half' if minute == 30 else 'quarter'} past {said}"
    if minute >= 10 and dice.chance(0.25):
        return f"{number_words(hour)} {number_words(minute)}"
    return f"{hour}:{minute:02}"


def _day_part(hour: int) -> tuple[tuple[str, int], ...]:
    evening = "in the afternoon" if hour < 5 else "in the evening"
    return ("in the morning", 0), (evening, 12)


# --- Rooms --------------------------------------------------------------------------


def pair_split(device: str, room: str) -> Split:
    """Which split may name a device in a room; a stable hash holds out three pairs in eight."""
    bucket = zlib.crc32(f"{device}/{room}".encode()) % 8
    return "test" if bucket < 2 else "valid" if bucket == 2 else "train"


def common_rooms(device: str, split: Split) -> tuple[str, ...]:
    """Rooms everybody has, in which a split's commands may name this device."""
    return tuple(room for room in COMMON_ROOMS if pair_split(device, room) == split)


def pick_room(device: str, split: Split, dice: Dice) -> str:
    """Every second room of a held-out command is a common one; training has more of the rare ones, to copy from."""
    common = common_rooms(device, split)
    return dice.pick(common if common and dice.chance(0.3 if split == "train" else 0.5) else ROOMS[split])


# --- Intents ------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """What one command says; phrases are filled into its template."""

    call: Call
    words: Mapping[str, str]


def _switch(split: Split, dice: Dice) -> Slots:
    device = dice.pick(("light", "light", "light", "heating", "fan", "tv", "oven", "coffee machine", "humidifier"))
    action, opposite = dice.pick((("on", "off"), ("off", "on")))
    return Slots(Call(device, action), {"o": action, "O": opposite})


def _act(split: Split, dice: Dice) -> Slots:
    device = dice.pick(tuple(VERBS))
    action = dice.pick(tuple(VERBS[device]))
    return Slots(Call(device, action), {"verb": dice.pick(VERBS[device][action])})


Phrase = Callable[[Split, Dice], tuple[str, str]]
_MEASURES: Mapping[str, Phrase] = {
    "light": percent,
    "blinds": percent,
    "fan": percent,
    "speaker": percent,
    "heating": degrees("celsius"),
    "oven": degrees("oven-celsius"),
}
_SETTABLE = ("light", "light", "blinds", "fan", "speaker", "heating", "heating", "heating", "oven")


def _set(devices: Sequence[str], measures: Mapping[str, Phrase] = _MEASURES) -> Callable[[Split, Dice], Slots]:
    def make(split: Split, dice: Dice) -> Slots:
        device = dice.pick(devices)
        said, value = measures[device](split, dice)
        decoy = next((other for other, meant in _throws(measures[device], split, dice) if meant != value), said)
        words = {"v": said, "c": said, "V": decoy, "O": dice.pick(("on", "off"))}
        return Slots(Call(device, "set", value), words)

    return make


def _throws(phrase: Phrase, split: Split, dice: Dice) -> Iterator[tuple[str, str]]:
    # Bounded: a split with a single colour has no second one to name.
    return (phrase(split, dice) for _ in range(20))


def _change(split: Split, dice: Dice) -> Slots:
    device = dice.pick(("light", "fan", "heating", "heating", "speaker"))
    said, value = (degrees("degrees") if device == "heating" else percent)(split, dice)
    action, verbs = dice.pick((("up", ("raise", "increase")), ("down", ("lower", "reduce", "decrease"))))
    return Slots(Call(device, action, value), {"v": said, "o": action, "verb": dice.pick(verbs)})


def _everywhere(split: Split, dice: Dice) -> Slots:
    slots = _switch(split, dice)
    device = dice.pick(("light", "light", "fan", "heating", "tv"))
    return replace(slots, call=replace(slots.call, device=device, room="all"))


@dataclass(frozen=True)
class Intent:
    share: float
    make: Callable[[Split, Dice], Slots]
    timed: bool = False
    """Whether a time may be added."""


INTENTS: Mapping[str, Intent] = {
    "switch": Intent(0.13, _switch, timed=True),
    "act": Intent(0.15, _act, timed=True),
    "level": Intent(0.14, _set(_SETTABLE), timed=True),
    "dim": Intent(0.05, _set(("light",)), timed=True),
    "volume": Intent(0.04, _set(("speaker",)), timed=True),
    "change": Intent(0.08, _change, timed=True),
    "colour": Intent(0.05, _set(("light",), {"light": colour}), timed=True),
    "timer": Intent(0.05, _set(("timer",), {"timer": duration})),
    "everywhere": Intent(0.05, _everywhere, timed=True),
    "keep": Intent(0.04, _switch),
    "not-but": Intent(0.04, _switch),
    "not-on-but-level": Intent(0.03, _set(("light", "fan", "blinds", "heating"))),
    "not-value": Intent(0.05, _set(_SETTABLE)),
    "not-room": Intent(0.03, _switch),
    "unsupported": Intent(0.07, lambda split, dice: Slots(UNSUPPORTED, {"q": dice.pick(refusals.REQUESTS[split])})),
}
_IMPERATIVES = frozenset({
    "turn", "switch", "set", "put", "make", "bring", "change", "adjust", "move", "take", "dim", "brighten", "get",
    "give", "play", "start", "go", "leave", "keep", "run", "help", "create", "flip", "shift", "let's", "{verb}",
})  # fmt: skip
"""First words of templates that may follow "could you"."""


def make_command(name: str, split: Split, dice: Dice) -> Command | None:
    """One command of an intent, or None when this throw has nothing that its split may say."""
    slots = INTENTS[name].make(split, dice)
    if name == "unsupported":
        frame = dice.pick(refusals.FRAMES[split])
        text = frame.format(**slots.words)
        return Command(_style(text, dice), slots.call, f"{name}: {frame}", core=text)
    template = dice.pick(TEMPLATES[name][split])
    placed = _place(slots, template, split, dice)
    if placed is None:
        return None
    call = placed.call
    text = _agree(template.format(**placed.words), placed.words["d"])
    # Times are the hardest to learn: training sees more of them.
    if INTENTS[name].timed and dice.chance(0.5 if split == "train" else 0.38):
        said, time = moment(split, dice)
        call = replace(call, time=time)
        text = f"{said}, {text}" if dice.chance(0.3) else f"{text} {said}"
    if split != "train" and not _is_novel(call):
        return None
    polite = _polite(text, template, call, split, dice)
    return Command(_style(polite, dice), call, f"{name}: {template}", core=text)


def _place(slots: Slots, template: str, split: Split, dice: Dice) -> Slots | None:
    """Choose the device's name and the room, as the template has them."""
    device = slots.call.device or ""
    words = {**slots.words, "d": dice.pick(NAMES.get(device, (device,))), "w": ""}
    if slots.call.room == "all":
        one = words["d"].removesuffix("s").replace("heating", "heater")
        return Slots(slots.call, words | {"d": one if "every {d}" in template else one + "s"})
    needs_room = "{r}" in template
    if not needs_room and ("{w}" not in template or device in ROOMLESS or dice.chance(0.35)):
        return Slots(slots.call, words)
    if device in ROOMLESS:
        return None
    room = pick_room(device, split, dice)
    decoy = dice.pick([other for other in (*COMMON_ROOMS, *ROOMS[split]) if other != room])
    words |= {"r": room, "w": f" in the {room}", "R": decoy}
    return Slots(replace(slots.call, room=room), words)


def _is_novel(call: Call) -> bool:
    """Whether a held-out command says more than a new template: rooms and numbers come from its split's own pools."""
    clock = call.time is not None and any(map(str.isdigit, call.time)) and call.time not in ("12:00", "00:00")
    return call.room not in (None, "all") or call.value is not None or clock


def _agree(text: str, name: str) -> str:
    """Plural forms for plural names; "a 10 minute timer"."""
    text = re.sub(r"(minute|second|hour)s timer", r"\1 timer", text)
    if not name.endswith("s"):
        return text
    for one, many in ((" it ", " them "), (" is ", " are "), (" stays ", " stay "), (" has to ", " have to ")):
        text = text.replace(one, many)
    return text.replace("shouldn't be", "should not be")


def _polite(text: str, template: str, call: Call, split: Split, dice: Dice) -> str:
    prefix, suffix = dice.pick(PREFIXES[split]), dice.pick(SUFFIXES[split])
    asking = prefix.strip().endswith(("you", "please"))
    if asking and (template.split()[0] not in _IMPERATIVES or not text.startswith(template.split("{")[0])):
        prefix = ""
    if call.time and suffix.strip() in ("now", "right away"):
        suffix = ""
    return prefix + text + suffix


def _style(text: str, dice: Dice) -> str:
    """Mostly as a speech recogniser writes, sometimes as a person types."""
    if dice.chance(0.75):
        return text
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:] + "."


# --- The data set ---------------------------------------------------------------------


def commands(split: Split, size: int | None = None, seed: int = SEED, taken: Iterable[str] = ()) -> Iterator[Command]:
    """A split's commands in their final order; no sentence occurs twice.

    Args:
        size: how many; by default as many as the data set has.
        seed: another one gives other commands of the same words and templates.
        taken: sentences without politeness that are not to occur.
    """
    size = SIZES[split] if size is None else size
    dice = Dice(f"{seed}/{split}")
    seen = set(taken)
    made: list[Command] = []
    total = 0.0
    for name, intent in INTENTS.items():
        total += intent.share
        # Rounding the running total makes the parts add up.
        wanted = round(total * size) - len(made)
        while wanted:
            command = make_command(name, split, dice)
            if command is not None and command.core not in seen:
                seen.add(command.core)
                made.append(command)
                wanted -= 1
    return iter(sorted(made, key=lambda command: sha256(f"{seed}/{command.text}".encode()).digest()))


def lines(made: Iterable[Command]) -> str:
    """Commands as JSONL in the messages format."""

    def line(command: Command) -> str:
        pairs = (("system", SYSTEM), ("user", command.text), ("assistant", command.call.json()))
        return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})

    return "".join(line(command) + "\n" for command in made)


def write(folder: Path) -> None:
    """Write the three splits and their manifest.

    Raises:
        WriteError: when the folder cannot be written.
    """
    texts = {split: lines(commands(split)) for split in SPLITS}
    for split, text in texts.items():
        write_text(folder / f"{split}.jsonl", text)
    splits = {
        split: {"examples": text.count("\n"), "sha256": sha256(text.encode()).hexdigest()}
        for split, text in texts.items()
    }
    digest = sha256("".join(f"{split} {item['sha256']}\n" for split, item in splits.items()).encode()).hexdigest()
    manifest = {"schema": 1, "name": NAME, "format": "messages", "licence": LICENCE, "seed": SEED}
    write_json(folder / "data.json", {**manifest, "digest": digest, "splits": splits})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the smart-home data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train, valid, test.jsonl and data.json")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
