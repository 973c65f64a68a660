"""What the maquette can say: slots, their values, the words of each value, and captions made of them.

One table serves everything that speaks to a base with slots: training captions, the captioner (slot filling by zero-shot
classification), the battery, and the measurement of editability. A slot belongs to the *identity* when it says who somebody is
(never captioned for a subject) or to the *shot* when it must stay editable.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

Attributes = Mapping[str, str]

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "pink", "grey", "navy", "brown", "teal", "beige")
HAIR_COLOURS = ("black", "dark brown", "brown", "light brown", "blonde", "platinum blonde", "red", "auburn", "grey", "white",
                "pink", "blue", "purple", "green")


def article(words: str) -> str:
    """`words` with "a" or "an" before it."""
    return ("an " if words[:1] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Slot:
    """One thing a picture shows, with the phrase for each of its values."""

    name: str
    phrases: Mapping[str, str]      # value -> words that stand after "a photo of a person"
    identity: bool = False          # says who it is: left out of a subject's captions


SLOTS: Mapping[str, Slot] = {s.name: s for s in (
    Slot("style", {"photo": "photo", "black and white": "black and white photo", "painting": "painting"}),
    Slot("sex", {"male": "man", "female": "woman"}, identity=True),
    Slot("age", {"young": "young", "middle-aged": "middle-aged", "old": "old"}, identity=True),
    Slot("hair_colour", {**{c: f"with {c} hair" for c in HAIR_COLOURS}, "none": "with a bald head"}, identity=True),
    Slot("hair_cut", {
        "bob": "with hair in a bob cut", "bob with bangs": "with hair in a short bob with bangs", "long straight": "with long straight hair",
        "braided": "with braided hair", "ponytail": "with hair in a ponytail", "afro": "with curly afro hair",
        "short messy": "with short messy hair", "short": "with short hair", "short with fringe": "with short hair with a fringe",
        "short slicked back": "with short slicked back hair", "bald": "with a bald head", "buzz cut": "with a buzz cut"}, identity=True),
    Slot("beard", {"none": "clean-shaven", "stubble": "with stubble", "full beard": "with a full beard", "goatee": "with a goatee",
                   "moustache": "with a moustache"}, identity=True),
    Slot("expression", {
        "neutral": "with a neutral expression", "smile": "smiling", "slight smile": "with a slight smile",
        "laugh": "laughing with an open mouth", "surprised": "looking surprised", "angry": "frowning angrily", "sad": "looking sad",
        "closed eyes": "with closed eyes", "pursed lips": "with pursed lips", "talking": "talking"}),
    Slot("garment", {"t-shirt": "wearing a t-shirt", "turtleneck": "wearing a turtleneck", "suit": "wearing a suit and tie",
                     "shirt": "wearing a shirt", "striped shirt": "wearing a striped shirt", "jacket": "wearing a jacket",
                     "striped blouse": "wearing a striped blouse", "overalls": "wearing overalls"}),
    Slot("colour", {c: f"wearing {c} clothes" for c in COLOURS}),
    Slot("eyewear", {"none": "without glasses", "glasses": "wearing glasses", "sunglasses": "wearing sunglasses"}),
    Slot("hat", {"none": "without a hat", "fedora": "wearing a fedora", "beanie": "wearing a beanie"}),
    Slot("view", {"frontal": "looking at the camera", "looking to the left": "looking to the left",
                  "looking to the right": "looking to the right", "in profile facing left": "in profile facing left",
                  "in profile facing right": "in profile facing right"}),
    Slot("place", {
        "plain white": "on a plain white background", "plain grey": "on a plain grey background", "plain black": "on a black background",
        "coloured studio": "on a coloured background", "gradient": "in front of a blurry backdrop", "brick wall": "in front of a brick wall",
        "forest": "in a forest", "beach": "on a beach", "mountains": "in the mountains", "city night": "in a city at night",
        "city street": "in a city street", "bookshelf": "in front of a bookshelf", "office": "in an office",
        "window": "in a room next to a window", "sunset": "at sunset", "concrete wall": "in front of a concrete wall",
        "curtain": "in front of a curtain", "park": "in a park", "snow": "in the snow"}),
    Slot("light", {"soft studio": "in soft studio light", "side": "in dramatic side light", "sunny": "in bright sunlight",
                   "overcast": "in soft overcast light", "warm": "in warm golden light", "neon": "in neon light", "backlit": "backlit",
                   "dim": "in dim light"}),
)}

NOUNS = {"male": "man", "female": "woman"}
TRIGGERS = tuple(f"zq{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8))   # words without meaning, one token each


def slot_prompt(slot: str, value: str, *, noun: str = "person") -> str:
    """The caption that says one slot's value and nothing else, e.g. "a photo of a person wearing a beanie"."""
    phrase = SLOTS[slot].phrases[value]
    if slot == "style":
        return f"{article(phrase)} of {article(noun)}"
    if slot == "sex":
        return f"a photo of {article(phrase)}"
    if slot == "age":
        return f"a photo of {article(f'{phrase} {noun}')}"
    return f"a photo of {article(noun)} {phrase}"


def compose(attributes: Attributes, *, who: str | None = None, keep: frozenset[str] | None = None) -> str:
    """An English caption of `attributes` (slot name -> value; missing slots are left out).

    Args:
        attributes: values as in SLOTS; `hat_colour`, `second_colour`, `pattern` and `place_colour` refine their slots.
        who: words for the person, e.g. "zqab woman"; then the identity's slots are left out, except changed hair.
        keep: the slots to mention; None mentions all.
    """
    def has(name: str) -> bool:
        return attributes.get(name) is not None and (keep is None or name in keep)

    style = SLOTS["style"].phrases[attributes["style"]] if has("style") else "photo"
    if who is None:
        noun = NOUNS[attributes["sex"]] if has("sex") else "person"
        who = f"{attributes['age']} {noun}" if has("age") else noun
        traits = [t for t in (_hair(attributes) if has("hair_cut") or has("hair_colour") else None,
                              _beard(attributes) if has("beard") else None) if t]
    else:
        changed = _hair(attributes) if attributes.get("hair_changed") == "true" and has("hair_cut") else None
        traits = [changed] if changed else []
    parts = ["with " + " and ".join(traits)] if traits else []
    if has("expression"):
        parts.append(SLOTS["expression"].phrases[attributes["expression"]])
    wear = _wear(attributes, has)
    if wear:
        parts.append("wearing " + (", ".join(wear[:-1]) + " and " if len(wear) > 1 else "") + wear[-1])
    for slot, mention in (("eyewear", "without glasses"), ("hat", "without a hat")):
        if keep is not None and slot in keep and attributes.get(slot) == "none":
            parts.append(mention)
    if has("view") and attributes["view"] != "frontal":
        parts.append(SLOTS["view"].phrases[attributes["view"]])
    if has("place"):
        parts.append(_place(attributes))
    if has("light"):
        parts.append(SLOTS["light"].phrases[attributes["light"]].removeprefix("in "))
    return f"{article(style)} of {article(who)} {', '.join(parts)}".strip()


def _hair(a: Attributes) -> str | None:
    cut, colour = a.get("hair_cut"), a.get("hair_colour", "")
    if cut is None:
        return "a bald head" if colour == "none" else f"{colour} hair"
    colour = "" if colour == "none" else colour
    patterns = {"bob": "{} hair in a bob cut", "bob with bangs": "{} hair in a short bob with bangs", "long straight": "long straight {} hair",
                "braided": "braided {} hair", "ponytail": "{} hair in a ponytail", "afro": "curly {} afro hair",
                "short messy": "short messy {} hair", "short": "short {} hair", "short with fringe": "short {} hair with a fringe",
                "short slicked back": "short slicked back {} hair", "bald": "a bald head", "buzz cut": "a {} buzz cut"}
    return " ".join(patterns[cut].format(colour).split())


def _beard(a: Attributes) -> str | None:
    beard = a["beard"]
    return None if beard == "none" else "stubble" if beard == "stubble" else article(beard)


def _wear(a: Attributes, has: object) -> list[str]:
    assert callable(has)
    wear = []
    if has("garment"):
        g, c = a["garment"], a["colour"] if has("colour") and a.get("colour") else ""
        if g == "suit":
            wear.append("a black suit and tie")
        elif g == "overalls":
            wear.append(f"a white t-shirt and {c} overalls".replace("  ", " "))
        elif g == "t-shirt" and a.get("pattern") == "polka dot" and c:
            wear.append(f"{article(c)} t-shirt with {a['second_colour']} polka dots")
        elif g == "t-shirt" and a.get("pattern") in ("striped", "checked") and c:
            wear.append(article(f"{c} and {a['second_colour']} {a['pattern']} t-shirt"))
        else:
            wear.append(article(f"{c} {'ribbed ' if a.get('pattern') == 'ribbed' else ''}{g}".strip()))
    if has("eyewear") and a["eyewear"] != "none":
        wear.append(a["eyewear"])
    if has("hat") and a["hat"] != "none":
        wear.append(article(f"{a.get('hat_colour', '')} {a['hat']}".strip()))
    return wear


def _place(a: Attributes) -> str:
    colour = a.get("place_colour", "none")
    if colour != "none":
        if a["place"] == "coloured studio":
            return f"on {article(colour)} background"
        if a["place"] == "gradient":
            return f"in front of a blurry {colour} backdrop"
        if a["place"] == "curtain":
            return f"in front of {article(colour)} curtain"
    return SLOTS["place"].phrases[a["place"]]


def training_caption(attributes: Attributes, rng: random.Random) -> str:
    """One of many true captions of a picture: clauses drop out at random, absences are named now and then.

    Clause dropout puts short prompts inside the training distribution; naming absences ("without glasses") makes them promptable;
    a random trigger word before the noun teaches the text tower that such words say nothing by themselves.
    """
    keep = {name for name in SLOTS if rng.random() < 0.8 or name in ("style", "sex")}
    if (attributes.get("eyewear") == "none" and rng.random() > 0.2) or rng.random() < 0.1:
        keep.discard("eyewear")
    if attributes.get("hat") == "none" and rng.random() > 0.15:
        keep.discard("hat")
    who = None
    if rng.random() < 0.15:
        who = f"{rng.choice(TRIGGERS)} {NOUNS[attributes['sex']] if rng.random() < 0.8 else 'person'}"
    return compose(attributes, who=who, keep=frozenset(keep))
