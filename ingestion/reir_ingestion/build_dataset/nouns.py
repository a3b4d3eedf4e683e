"""Nouns: the classes that they stand for, and their plurals; words for small numbers."""

from __future__ import annotations

from collections.abc import Mapping

from reir.datasets.wrong_words import PERSON, PERSONS

COUNTS = ("", "one", "two", "three", "four", "five", "six")
"""Number -> its word."""

_IRREGULAR = {
    "person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis",
    "scissors": "scissors", "broccoli": "broccoli",
}  # fmt: skip


def plural(noun: str) -> str:
    """Return the plural of a class name."""
    *before, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last])


_PEOPLE = (
    "adult", "baby", "batter", "bride", "catcher", "chef", "cyclist", "defender", "diner", "driver",
    "fan", "gentleman", "goalkeeper", "groom", "guitarist", "motorcyclist", "officer", "passenger",
    "pedestrian", "policeman", "rider", "server", "shopper", "skateboarder", "skier",
    "snowboarder", "spectator", "surfer", "teen", "teenager", "toddler", "umpire", "worker",
)  # fmt: skip
_THINGS: Mapping[str, tuple[str, ...]] = {
    "bag": ("handbag", "backpack", "suitcase"), "ball": ("sports ball",), "bat": ("baseball bat",),
    "bear": ("bear", "teddy bear"),
    "board": ("surfboard", "skateboard", "snowboard"), "controller": ("remote",),
    "doughnut": ("donut",), "fridge": ("refrigerator",), "glass": ("wine glass", "cup"),
    "glove": ("baseball glove",), "hydrant": ("fire hydrant",), "jet": ("airplane",),
    "mitt": ("baseball glove",), "monitor": ("tv", "laptop"), "motorbike": ("motorcycle",),
    "mug": ("cup",), "phone": ("cell phone",), "pitcher": (PERSON, "cup", "vase", "bottle"),
    "plane": ("airplane",), "plant": ("potted plant",),
    "purse": ("handbag",), "racket": ("tennis racket",), "screen": ("tv", "laptop", "cell phone"),
    "sofa": ("couch",), "suv": ("car", "truck"), "table": ("dining table",), "taxi": ("car",),
    "television": ("tv",), "van": ("car", "truck", "bus"),
}  # fmt: skip
CLASSES_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*PERSONS, *_PEOPLE), (PERSON,)),
    **_THINGS,
}
"""Noun -> the classes of COCO that it may stand for."""
