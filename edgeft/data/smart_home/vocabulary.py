"""Words, values and sentence templates of the smart-home task, each assigned to exactly one split.

Slots in templates: {d} device phrase, {r} room, {w} "in the <room>" or nothing, {v} value phrase, {t} time phrase,
{verb} and {o} the action in words, {c} colour. Upper-case slots ({V}, {R}, {O}) are decoys: values that are named and
taken back.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
PerSplit = Mapping[Split, tuple[str, ...]]

SYSTEM = "Turn the smart-home command into one JSON call."

COMMON_ROOMS = (
    "kitchen", "living room", "bedroom", "bathroom", "office", "hallway", "nursery", "garage", "attic", "study",
)  # fmt: skip
"""Rooms that every split names; which device one may name in them is each split's own."""

# Many, so that a room is copied rather than chosen from a list.
_MORE_ROOMS = (
    "basement", "dining room", "laundry room", "conservatory", "workshop", "porch", "garden", "terrace", "den",
    "loft", "lounge", "closet", "gym", "sunroom", "playroom", "utility room", "music room", "master bedroom",
    "game room", "storage room", "shed", "greenhouse", "entrance", "stairway", "lobby", "corridor", "cloakroom",
    "sauna", "studio", "barn", "patio", "veranda", "mudroom", "kids room", "dressing room", "reading room",
    "spare room", "foyer", "alcove", "annex", "antechamber", "apartment", "arcade", "archive", "armory", "atelier",
    "atrium", "aviary", "backyard", "ballroom", "bakery", "bar", "bay window", "billiard room", "boathouse",
    "boiler room", "boot room", "boudoir", "breakfast room", "bungalow", "bunk room", "cabin", "cafe", "canteen",
    "carport", "chapel", "cinema", "classroom", "clinic", "cottage", "courtyard", "craft room", "dance hall",
    "darkroom", "deck", "dormitory", "driveway", "drying room", "engine room", "family room", "farmhouse", "forge",
    "front yard", "gallery", "gatehouse", "gazebo", "granny flat", "great hall", "hobby room", "home theater",
    "hot tub", "hut", "inner court", "ironing room", "jacuzzi", "kennel", "kitchenette", "lab", "landing", "lean-to",
    "linen room", "lodge", "mailroom", "maisonette", "meeting room", "mezzanine", "museum", "nook", "observatory",
    "orangery", "orchard", "outhouse", "panic room", "parlor", "pavilion", "penthouse", "pergola", "piano room",
    "pool house", "powder room", "prayer room", "print room", "quiet room", "reception", "recording booth", "rooftop",
    "rotunda", "safe room", "salon", "schoolroom", "scullery", "server room", "sewing room", "shower",
    "side entrance", "silo", "sitting room", "smoking room", "snug", "solarium", "spa", "stable", "staircase",
    "steam room", "stockroom", "storefront", "summerhouse", "sun deck", "swimming pool", "tack room", "tea room",
    "tent", "theater", "toilet", "tool shed", "tower", "treehouse", "tv room", "upper floor", "vault", "vestibule",
    "vineyard", "waiting room", "walk-in closet", "wardrobe", "warehouse", "washroom", "west wing", "wine bar",
    "winter garden", "wood shop", "yard", "yoga room", "ground floor", "first floor", "top floor", "back office",
    "front hall", "north room", "red room", "blue bedroom", "children's room", "grandma's room", "tom's room",
    "anna's bedroom", "boys' room", "pantry", "cellar", "guest room", "library", "balcony",
)  # fmt: skip


def deal(words: Sequence[str]) -> PerSplit:
    """Words for each split by a stable hash: of sixteen, one to validate and two to test."""
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for word in words:
        bucket = zlib.crc32(word.encode()) % 16
        splits["test" if bucket < 2 else "valid" if bucket == 2 else "train"].append(word)
    return {split: tuple(dealt) for split, dealt in splits.items()}


ROOMS: PerSplit = deal(_MORE_ROOMS)
"""Rooms of one split alone. Nobody chose which: unseen words are as hard as words are."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "light": ("light", "lights", "lamp", "light", "lights"),
    "heating": ("heating", "heater", "radiator", "heating"),
    "fan": ("fan", "ceiling fan", "fan"),
    "blinds": ("blinds", "shutters", "curtains"),
    "tv": ("tv", "television"),
    "speaker": ("speaker", "speakers"),
    "coffee machine": ("coffee machine", "coffee maker"),
    "oven": ("oven",),
    "vacuum": ("vacuum", "robot vacuum", "vacuum cleaner"),
    "humidifier": ("humidifier",),
    "front door": ("front door",),
    "back door": ("back door",),
    "garage door": ("garage door",),
}
"""Canonical device name -> what people call it."""

ROOMLESS = frozenset({"oven", "coffee machine", "front door", "back door", "garage door"})
"""Devices of which a home has one: their commands name no room."""

COLOURS: PerSplit = deal((
    "red", "green", "blue", "purple", "orange", "pink", "yellow", "white", "violet", "cyan", "amber", "teal",
    "indigo", "crimson", "lavender", "peach", "mint", "salmon", "coral", "lime", "navy", "beige", "maroon", "olive",
    "silver", "warm white", "cool white", "daylight", "ivory", "scarlet", "emerald", "aqua", "lilac", "rose",
    "magenta", "turquoise", "gold",
))  # fmt: skip

# Of each kind others, so that a number word held out here is taught there.
HELD_OUT: Mapping[str, Mapping[Split, tuple[int, ...]]] = {
    "percent": {"valid": (14, 27, 32, 48, 59, 66, 73, 81, 97), "test": (12, 17, 23, 34, 46, 53, 62, 64, 71, 85, 90)},
    "celsius": {"valid": (15, 28), "test": (18, 23, 26)},
    "fahrenheit": {"valid": (61, 72), "test": (57, 63, 68, 74)},
    "oven-celsius": {"valid": (155, 205), "test": (165, 180, 215, 235)},
    "oven-fahrenheit": {"valid": (340,), "test": (325, 365, 410)},
    "degrees": {"valid": (6,), "test": (4, 7)},
    "minutes": {"valid": (13, 28, 36, 50), "test": (11, 16, 25, 35, 42, 55)},
    "hours": {"valid": (7,), "test": (5, 9)},
    "clock-minute": {"valid": (8, 33, 50), "test": (19, 25, 35, 42, 55)},
}
RANGES: Mapping[str, range] = {
    "percent": range(1, 101),
    "celsius": range(10, 31),
    "fahrenheit": range(55, 81),
    "oven-celsius": range(120, 255, 5),
    "oven-fahrenheit": range(250, 455, 5),
    "degrees": range(2, 10),
    "minutes": range(2, 91),
    "hours": range(2, 13),
    "clock-minute": range(1, 60),
}
"""Numbers of each kind; those not held out are the training split's."""

# Doubled entries are more frequent.
PREFIXES: PerSplit = {
    "train": ("",) * 9 + ("please ", "hey ", "ok ", "um ", "could you ", "can you ", "would you please ", "hi, "),
    "valid": ("",) * 6 + ("alright, ", "can you please "),
    "test": ("",) * 6 + ("hello, ", "could you please ", "hey there, "),
}
SUFFIXES: PerSplit = {
    "train": ("",) * 8 + (" please", " thanks", " for me", " now"),
    "valid": ("",) * 6 + (" thank you",),
    "test": ("",) * 6 + (" right away", " would you"),
}

VERBS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "blinds": {"open": ("open", "pull up", "raise"), "close": ("close", "shut", "pull down", "lower")},
    "garage door": {"open": ("open",), "close": ("close", "shut")},
    "front door": {"lock": ("lock",), "unlock": ("unlock",)},
    "back door": {"lock": ("lock",), "unlock": ("unlock",)},
    "speaker": {"play": ("play music on",), "pause": ("pause", "stop the music on")},
    "vacuum": {"start": ("start", "run", "launch"), "stop": ("stop", "halt")},
    "light": {"on": ("turn on", "switch on", "put on"), "off": ("turn off", "switch off", "put out")},
    "heating": {"on": ("turn on", "switch on", "fire up"), "off": ("turn off", "switch off", "shut off")},
    "fan": {"on": ("turn on", "switch on", "start up"), "off": ("turn off", "switch off", "shut off")},
    "tv": {"on": ("turn on", "switch on"), "off": ("turn off", "switch off")},
    "humidifier": {"on": ("turn on", "switch on"), "off": ("turn off", "switch off")},
    "coffee machine": {"on": ("turn on", "switch on", "fire up"), "off": ("turn off", "switch off")},
    "oven": {"on": ("turn on", "switch on", "fire up"), "off": ("turn off", "switch off", "shut off")},
}

TEMPLATES: Mapping[str, PerSplit] = {
    # on and off, the particle apart from the verb
    "switch": {
        "train": (
            "turn {o} the {d}{w}", "switch {o} the {d}{w}", "turn the {d}{w} {o}", "switch the {d} {o}{w}",
            "{d} {o}{w}", "turn {o} the {r} {d}", "switch the {r} {d} {o}", "{r} {d} {o}",
            "i want the {d} {o}{w}", "i need the {r} {d} {o}", "the {d}{w} should be {o}", "set the {d}{w} to {o}",
            "get the {d} {o}{w}", "make sure the {d}{w} is {o}", "in the {r}, turn the {d} {o}", "{d}{w}, {o}",
        ),
        "valid": ("put the {d}{w} {o}", "have the {r} {d} {o}", "{o} with the {d}{w}"),
        "test": (
            "i'd like the {d}{w} {o}", "could we have the {d} {o}{w}", "flip the {r} {d} {o}",
            "let's have the {d}{w} turned {o}", "for the {r}, {d} {o}",
        ),
    },
    # any verb
    "act": {
        "train": (
            "{verb} the {d}{w}", "{verb} the {r} {d}", "i need you to {verb} the {d}{w}",
            "go ahead and {verb} the {d}{w}",
            "time to {verb} the {r} {d}", "i want you to {verb} the {r} {d}", "in the {r}, {verb} the {d}",
            "you can {verb} the {d}{w}", "let's {verb} the {d}{w}", "just {verb} the {r} {d}", "now {verb} the {d}{w}",
            "would you {verb} the {r} {d}", "remember to {verb} the {d}{w}", "do me a favor and {verb} the {d}{w}",
        ),
        "valid": ("be so kind and {verb} the {d}{w}", "we should {verb} the {r} {d}", "quickly {verb} the {d}{w}"),
        "test": (
            "i'd like you to {verb} the {d}{w}", "would you mind, {verb} the {r} {d}", "it's time to {verb} the {d}{w}",
            "help me out and {verb} the {r} {d}", "you should {verb} the {d}{w}",
        ),
    },
    "level": {
        "train": (
            "set the {d}{w} to {v}", "put the {d}{w} at {v}", "set the {r} {d} to {v}", "{r} {d} to {v}",
            "{d}{w} at {v}",
            "i want the {d}{w} at {v}", "make the {r} {d} {v}", "bring the {d}{w} to {v}", "change the {d}{w} to {v}",
            "adjust the {r} {d} to {v}", "move the {d}{w} to {v}", "{v} on the {r} {d}",
            "in the {r}, set the {d} to {v}",
            "the {d}{w} should be at {v}", "take the {r} {d} to {v}", "turn the {d}{w} to {v}",
        ),
        "valid": ("get the {d}{w} to {v}", "keep the {r} {d} at {v}", "i need {v} on the {d}{w}"),
        "test": (
            "i'd like the {d}{w} at {v}", "let's have the {r} {d} at {v}", "run the {d}{w} at {v}",
            "for the {r}, {d} at {v}", "can we get the {d}{w} to {v}",
        ),
    },
    "dim": {
        "train": (
            "dim the {d}{w} to {v}", "dim the {r} {d} to {v}", "brighten the {r} {d} to {v}", "{d} brightness{w} {v}",
            "set the brightness of the {d}{w} to {v}", "brighten the {d}{w} to {v}", "brightness of the {r} {d} to {v}",
            "make the {d}{w} dimmer, {v}", "make the {d}{w} brighter, {v}", "i want {v} brightness on the {d}{w}",
        ),
        "valid": ("bring the brightness of the {d}{w} to {v}", "soften the {r} {d} to {v}"),
        "test": (
            "change the brightness of the {r} {d} to {v}", "let the brightness of the {d}{w} be {v}",
            "{r} {d} brightness at {v}",
        ),
    },
    "volume": {
        "train": (
            "set the volume{w} to {v}", "volume{w} to {v}", "put the {r} volume at {v}", "volume at {v}{w}",
            "make the volume {v}{w}", "set the {d} volume{w} to {v}", "i want the volume{w} at {v}",
            "change the volume of the {d}{w} to {v}", "{r} volume to {v}", "play at {v} volume{w}",
        ),
        "valid": ("get the volume{w} to {v}", "bring the {r} volume to {v}"),
        "test": (
            "adjust the volume{w} to {v}", "i'd like the {r} volume at {v}", "let's have the {d} volume{w} at {v}",
        ),
    },
    # relative change; {o} is up or down, {verb} raise or lower
    "change": {
        "train": (
            "turn the {d}{w} {o} by {v}", "turn {o} the {d}{w} by {v}", "{verb} the {d}{w} by {v}", "{d} {o} {v}{w}",
            "turn the {r} {d} {o} {v}", "{verb} the {r} {d} by {v}", "bring the {d}{w} {o} by {v}",
            "{r} {d} {o} by {v}",
            "i want the {d}{w} {o} by {v}", "take the {r} {d} {o} {v}", "in the {r}, {verb} the {d} by {v}",
            "move the {d}{w} {o} by {v}", "go {o} {v} on the {d}{w}", "put the {r} {d} {o} by {v}",
        ),
        "valid": ("get the {d}{w} {o} by {v}", "push the {r} {d} {o} by {v}"),
        "test": ("i'd like the {d}{w} {o} by {v}", "let's {verb} the {r} {d} by {v}", "shift the {d}{w} {o} by {v}"),
    },
    "colour": {
        "train": (
            "make the {d}{w} {c}", "set the {d}{w} to {c}", "turn the {r} {d} {c}", "change the {d}{w} to {c}",
            "{d} {c}{w}",
            "i want {c} {d}{w}", "switch the {r} {d} to {c}", "{r} {d} to {c}", "give me {c} {d}{w}",
            "colour the {d}{w} {c}",
            "put the {r} {d} on {c}", "change the colour of the {d}{w} to {c}", "in the {r}, make the {d} {c}",
        ),
        "valid": ("paint the {r} with {c} {d}", "get the {d}{w} to {c}"),
        "test": ("i'd like {c} {d}{w}", "let's have the {r} {d} in {c}", "set the colour of the {d}{w} to {c}"),
    },
    "timer": {
        "train": (
            "set a timer for {v}", "set the timer to {v}", "start a timer for {v}", "start a {v} timer", "timer {v}",
            "timer for {v}", "i need a timer for {v}", "give me a {v} timer", "put {v} on the timer", "count down {v}",
            "make it a {v} timer", "new timer, {v}", "i want a timer of {v}", "set a {v} timer",
        ),
        "valid": ("begin a timer of {v}", "let the timer run {v}"),
        "test": ("i'd like a {v} timer", "create a timer for {v}", "run a timer for {v}", "can i get a timer for {v}"),
    },
    "everywhere": {
        "train": (
            "turn {o} all the {d}", "turn all the {d} {o}", "all {d} {o}", "switch {o} every {d}", "every {d} {o}",
            "turn {o} the {d} everywhere", "{d} {o} everywhere", "switch the {d} {o} in all rooms",
            "turn {o} the {d} in every room", "{d} {o} in the whole house", "switch {o} the {d} in the whole house",
            "put all the {d} {o}, please", "set every {d} to {o}", "i want all the {d} {o}",
        ),
        "valid": ("put all the {d} {o}", "the {d} {o} in the entire house"),
        "test": ("i'd like all the {d} {o}", "switch all the {d} {o}", "turn {o} the {d} in the whole house"),
    },
    "keep": {
        "train": (
            "leave the {d} {o}{w}", "keep the {d}{w} {o}", "leave the {r} {d} {o}", "keep the {r} {d} {o}",
            "the {d}{w} stays {o}", "let the {d}{w} stay {o}", "the {r} {d} should stay {o}", "leave {o} the {d}{w}",
            "make sure the {d} stays {o}{w}", "i want the {d}{w} to stay {o}",
        ),
        "valid": ("have the {d}{w} stay {o}", "the {d}{w} has to stay {o}"),
        "test": (
            "the {d}{w} must stay {o}", "i'd like the {r} {d} to stay {o}", "please see that the {d}{w} stays {o}",
        ),
    },
    # {O} and {o} are opposite: only the second one counts
    "not-but": {
        "train": (
            "don't turn {O} the {d}{w}, turn it {o}", "not {O}, turn the {d}{w} {o}", "turn the {d}{w} {o}, not {O}",
            "don't switch the {r} {d} {O}, switch it {o}", "i said {o}, not {O}, for the {d}{w}",
            "never mind {O}, i want the {r} {d} {o}", "the {d}{w} should be {o}, not {O}",
            "turn the {r} {d} {O}, no wait, {o}", "turn {O} the {d}{w}, sorry, i mean {o}",
            "don't leave the {d}{w} {O}, turn it {o}", "the {r} {d} shouldn't be {O}, turn it {o}",
        ),
        "valid": ("do not put the {d}{w} {O}, put it {o}", "{o} and not {O} for the {r} {d}"),
        "test": (
            "do not turn the {r} {d} {O}, turn it {o}", "i want the {d}{w} {o}, not {O}",
            "don't keep the {d}{w} {O}, switch it {o}",
        ),
    },
    "not-on-but-level": {
        "train": (
            "don't turn {O} the {d}{w}, just set it to {v}", "don't switch the {r} {d} {O}, put it at {v}",
            "not {O}, set the {d}{w} to {v}", "set the {d}{w} to {v}, don't turn it {O}",
            "i don't want the {d}{w} {O}, just at {v}", "instead of turning the {r} {d} {O}, set it to {v}",
            "don't turn the {d} {O}{w}, bring it to {v}", "no need to turn {O} the {d}{w}, just make it {v}",
        ),
        "valid": ("rather than {O}, put the {d}{w} at {v}",),
        "test": ("do not turn {O} the {d}{w}, only set it to {v}", "don't switch {O} the {r} {d}, just put it at {v}"),
    },
    "not-value": {
        "train": (
            "don't set the {d}{w} to {V}, make it {v}", "set the {d}{w} to {V}, no wait, {v}",
            "set the {r} {d} to {v}, not {V}", "put the {d}{w} at {V}, sorry, i mean {v}",
            "not {V}, set the {d}{w} to {v}",
            "{V} is too much, set the {d}{w} to {v}", "change the {r} {d} from {V} to {v}",
            "instead of {V}, set the {r} {d} to {v}", "the {d}{w} is at {V}, set it to {v}",
        ),
        "valid": ("put the {r} {d} at {V}, or no, {v}",),
        "test": ("do not put the {d}{w} at {V}, set it to {v}", "the {r} {d} should be at {v}, not {V}"),
    },
    "not-room": {
        "train": (
            "turn {o} the {d} in the {r}, not in the {R}", "not the {R}, turn {o} the {d} in the {r}",
            "turn {o} the {R} {d}, no wait, the {r} {d}", "turn {o} the {d} in the {R}, sorry, in the {r}",
            "{d} {o} in the {r}, not the {R}", "switch {o} the {r} {d}, not the {R} {d}",
            "i said the {r}, not the {R}, turn the {d} {o}", "don't touch the {R}, turn {o} the {r} {d}",
            "i meant the {r} and not the {R}, turn {o} the {d}",
        ),
        "valid": ("leave the {R} alone, switch {o} the {d} in the {r}",),
        "test": ("switch the {d} {o} in the {r}, not the {R}", "turn {o} the {d} in the {R}, no, i mean in the {r}"),
    },
}  # fmt: skip
