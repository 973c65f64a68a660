"""What of a description must stay editable: place, light, clothes, expression, pose, view. Who somebody is goes out.

A network that describes pictures says both in one sentence. A word in a caption is explained by itself and need not be explained by the trigger; so what a
caption names can be changed by a prompt later, and what it leaves out becomes part of the person. The rules are the tables below, the rest takes a
sentence apart by them: at words that begin a clause, then at commas and "and", dropping what says who and keeping the others as they were written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


PERSONS = _set("""man men woman women boy boys girl girls guy guys lady ladies gentleman male female person people teen teenager adult individual subject baby toddler child kid
    infant blonde blond brunette redhead actor actress singer musician model politician president athlete player businessman businesswoman soldier nurse doctor teacher student
    bride groom mother father mom dad wife husband son daughter brother sister grandmother grandfather couple elder senior celebrity rapper dancer""")
SMALL = _set("baby toddler child kid infant")        # what a subject may hold
PRONOUNS = frozenset({"he", "she", "they", "him", "himself", "herself", "themselves", "who", "whose"})
POSSESSIVES = frozenset({"his", "her", "hers", "their", "its"})
DETERMINERS = frozenset({"a", "an", "the", "this", "that", "one", "two", "another"})

# Nouns that say who: what they stand in is dropped. What is worn in hair is not hair.
TRAITS = _set("""hair hairs beard beards moustache mustache goatee stubble sideburns eyelashes skin complexion freckles freckle wrinkles wrinkle dimples jawline
    cheekbones ponytail ponytails bun bangs fringe braids braid dreadlocks dreads locks curls curl afro mohawk ringlets pigtails updo bob haircut hairstyle hairline
    tattoo tattoos piercing piercings scar scars mole birthmark ethnicity race nationality age descent origin appearance features physique build height cut dreadlock""")
WORN_IN_HAIR = frozenset({"clip", "clips", "band", "tie", "net", "bow", "accessory", "accessories", "pin"})
# Nouns that say who together with these words only ...
SAYS_WHO_WITH: Mapping[str, frozenset[str]] = {
    "chin": _set("pointed cleft double strong"), "nose": _set("large small big long crooked pointed hooked straight wide"),
    "jaw": _set("square strong"), "waves": _set("loose soft long beachy"),
    "face": _set("round oval square heart-shaped long narrow thin wrinkled freckled handsome pretty beautiful young old chubby bearded"),
    "head": _set("bald shaved shaven balding"), "lips": _set("full thin plump"), "body": _set("slim muscular athletic slender")}
# ... or unless with these.
SAYS_WHO_UNLESS: Mapping[str, frozenset[str]] = {
    "eyes": _set("closed open opened wide shut half-closed squinting narrowed rolled looking gazing staring covered covering fixed focused squinted"),
    "eye": frozenset({"contact", "level"}), "eyebrows": _set("raised furrowed lowered knitted")}
# Adjectives that say who whatever they stand before, and those that do when nothing stands behind them.
WHO = _set("""bald balding bearded elderly middle-aged caucasian asian african african-american hispanic latino latina clean-shaven unshaven handsome freckled blue-eyed brown-eyed
    green-eyed fair-skinned dark-skinned light-skinned curly-haired long-haired short-haired dark-haired fair-haired red-haired black-haired blonde-haired teenage arafed araffe
    araffed mustachioed blonde blond brunette feminine masculine""")
WHO_ALONE = _set("young old older younger tall short slim slender thin fat chubby heavy muscular athletic attractive beautiful pretty male female black white very quite fairly and")

SHOWN = _set("smiling laughing grinning crying frowning serious angry sad surprised happy sleeping shirtless barefoot shouting screaming winking squinting yawning "
             "blindfolded masked hooded blurry")      # before the noun: "a smiling young man"
BODY = _set("face head arm arms neck shoulder shoulders back chin cheek cheeks forehead chest hand hands wrist leg legs body side sides ear ears top")
PICTURES = _set("photo photograph picture image portrait headshot shot snapshot")
PLAIN = _set("a an the of professional beautiful good nice great stock color colour digital camera close this")     # say nothing about a picture
MODIFIERS = _set("""black white red blue green yellow purple orange pink grey gray navy brown teal beige blonde blond auburn silver golden dark light long short medium curly wavy
    straight thick thin full big small large old young tall slim round bright soft warm cool""")

# Words that begin a clause: participles, which end in -ing unless they are nouns, and the prepositions of what is worn, shown and seen.
NOUNS_IN_ING = _set("""ring earring king building clothing ceiling evening morning lighting painting wing string spring setting wedding something nothing everything anything swing
    sling lightning dining swimming living parking railing shading bling viking balding shooting during string wing hiking boxing sibling ping ding""")
DOING: Mapping[str, str] = {"wears": "wearing", "stands": "standing", "sits": "sitting", "looks": "looking", "smiles": "smiling", "holds": "holding", "poses": "posing",
                            "leans": "leaning", "walks": "walking", "faces": "facing", "laughs": "laughing", "has": "with", "have": "with", "gazes": "gazing", "stares": "staring",
                            "frowns": "frowning", "tilts": "tilting"}
PREPOSITIONS = _set("in on at against with while under near behind beside during inside outside")
BEGINS = frozenset(DOING.values()) | PREPOSITIONS | {"dressed", "posed", "seated", "lit", "tilted", "turned"}
OBJECT_AFTER = _set("to beside behind with hugging holding near kissing carrying and at facing by over watching")
LOOSE = _set("of a an the and or but with to by is are was has have in on at from for as while very that which named called it being be who also both against near")

_LEADS = tuple(re.compile(pattern) for pattern in (
    r"\b(?:in )?th(?:is|e) (?:\w+ ){0,2}(?:image|photo|photograph|picture) (?:is|shows|depicts|features|captures|showcases|was|portrays|of)\b(?: taken)?", r"\bin th(?:is|e) (?:image|photo|picture|photograph)\b,?",
    r"\b(?:we can see|we see|there is|there are|can be seen|is seen|are seen|is visible|are visible)\b", r"\b(?:it |which )?(?:appears?|seems?|looks like) to be\b",
    r"\b(?:possibly |probably |maybe |around |about |likely )*in (?:his|her|their|the) (?:early|mid|late)?(?:[ -]to[ -](?:early|mid|late))?[ -]*(?:\d0'?s|teens|twenties|thirties|forties|fifties|sixties|seventies|eighties|mid-\w+)(?: or \w+)?",
    r"\bthis is\b", r"\b(?:approximately |around |about )?\d+[- ]years?[- ]old\b", r"\baged \d+\b", r"\b(?:around|about|over|under) \d+ years of age\b", r"\bof (?:\w+ )?(?:descent|origin|ethnicity|age|nationality)\b",
    r"\b(?:on|across|over) (?:his|her|their|the) face\b", r"\b(?:to|for) have\b", r"\bas (?:he|she|they|if)\b(?: is| are)?"))
# Names stand after words like these, or begin a sentence as its subject; "the Eiffel Tower" and "an American flag" are none.
_NAMES = re.compile(r"\b(of|named|called|by|as|is|actor|actress|singer|president|and) (?:[A-Z][\w'.-]*(?: |$))+(?!flag|street|style)")
_FIRST_NAME = re.compile(r"^ *(?!The\b|A\b|An\b|It\b|There\b|This\b|In\b)[A-Z][\w'.-]*(?: [A-Z][\w'.-]*)* (?=(?:is|was) \w+ing\b|(?:" + "|".join(DOING) + r")\b)")
# ... or are several capitalised words, or one before what only people do, with what follows a subject behind them; and what stands so between commas.
_PEOPLE_DO = "wearing|standing|sitting|looking|smiling|holding|posing|leaning|walking|laughing|talking|speaking|giving|playing|singing|dancing|reading|eating|drinking|riding|running"
_SAYS_NO_NAME = "The|A|An|It|There|This|In|On|At|With|Two|Three|Several|Black|White|Close|" + "|".join(
    sorted(word.capitalize() for word in PERSONS | PICTURES | SHOWN | MODIFIERS | WHO | WHO_ALONE | {"somebody", "someone", "everybody", "drawing", "painting"} if word.isalpha()))
_LONE_NAME = re.compile(rf"^ *(?!(?:{_SAYS_NO_NAME})\b)(?:[A-Z][\w'.-]*(?: [A-Z][\w'.-]*)+(?= [a-z]+ing\b| (?:and|{'|'.join(sorted(PREPOSITIONS))})\b|,| *$)"
                        rf"|[A-Z][\w'.-]*(?= (?:{_PEOPLE_DO})\b))")
_NAME_BETWEEN = re.compile(r", *[A-Z][\w'.-]*(?: [A-Z][\w'.-]*)+ *(?=,|$)")
_HEADS = _set("photo photograph picture image portrait headshot shot painting drawing sketch illustration close-up selfie silhouette view statue")


@dataclass(frozen=True)
class _Item:
    """A piece of a sentence: its words, how it was joined to the piece before, and the word that began its clause."""

    words: tuple[str, ...]
    joined: str                  # "": nothing stood between, else "," or "and"
    begun_by: str                # "" at the beginning of a sentence


def editable(text: str) -> str:
    """The parts of a description that must stay editable, in its own words and lower case; "" if it said nothing but who.

    >>> editable("a young man with a beard and glasses standing in front of a brick wall")
    'with glasses standing in front of a brick wall'
    """
    said: dict[str, None] = {}
    for sentence in re.split(r"[.!?;:\n]+(?:\s+|$)", text):
        words = _without_persons(_words(sentence))
        if kept := _joined(list(_items(words))):
            said[kept] = None
    return ", ".join(said)


def about(who: str, kept: str) -> str:
    """A caption of `who` with what `editable` kept; a picture that is no plain photo comes first, as in "a painting of zqaa woman, in a hat"."""
    head, _, rest = kept.partition(", ")
    if head.split()[-1:] and head.split()[-1] in _HEADS and not any(_begins(word) for word in head.split()):
        return f"{head} of {who}" + (f", {rest}" if rest else "")
    return f"a photo of {who}" + (f", {kept}" if kept else "")


def _words(sentence: str) -> list[str]:
    """Words, commas and clause borders ("|") of a sentence in lower case, without names and without what only leads in."""
    plain = re.sub(r"[\"“”()\[\]<>*]|</?s>", " ", sentence).replace("’", "'")
    plain = _NAME_BETWEEN.sub("", _LONE_NAME.sub("person", _FIRST_NAME.sub("person ", _NAMES.sub(r"\1 person ", plain)))).lower()
    for lead in _LEADS:
        plain = lead.sub(" | ", plain)
    plain = re.sub(r"\bclose up\b", "close-up", plain)
    plain = re.sub(r"\b(?:middle aged)\b", "middle-aged", plain)
    plain = re.sub(r"\b(?:african american)\b", "african-american", plain)
    plain = re.sub(r"('s) (?:face|head|portrait|profile picture)\b", r"\1", plain)
    return _unnamed(re.findall(r"[\w'-]+|,|\|", plain))


def _unnamed(words: list[str]) -> list[str]:
    """What a picture is a picture *of* is the subject, also by a name in lower case."""
    for at in range(len(words) - 2):
        if words[at] in _HEADS and words[at + 1] == "of" and words[at + 2] not in DETERMINERS | POSSESSIVES:
            end = next((i for i in range(at + 2, len(words)) if _begins(words[i]) or words[i] in (",", "|", "and")), len(words))
            return [*words[:at + 2], *(w for w in words[at + 2:end] if w in SHOWN), "person", *words[end:]]
    return words


def _begins(word: str) -> bool:
    return word in BEGINS or word in DOING or (word.endswith("ing") and word not in NOUNS_IN_ING | SHOWN)


def _without_persons(words: list[str]) -> list[str]:
    """The subject gone with its adjectives and a border in its place, others called "another person", pronouns out."""
    out: list[str] = []
    for at, word in enumerate(words):
        bare = word.removesuffix("'s")
        if bare in PRONOUNS:
            out.append("|")
        elif bare in POSSESSIVES:
            continue
        elif bare in PERSONS and not (bare in WHO and words[at + 1:at + 2] and words[at + 1] in TRAITS):
            start = _beginning(out)
            shown = [w for w in out[start:] if w in SHOWN]
            before = out[start - 1] if start else ""
            del out[start:]
            if before in OBJECT_AFTER and bare == word and not (before == "and" and out[-2:-1] in ([], ["|"])):
                out += ["a", bare] if bare in SMALL else ["another", "person"]
                continue
            out += ["|", *(w for s in shown for w in (s, "|"))]
        else:
            out.append("with" if word in ("has", "have") else word)
    return out


def _beginning(out: list[str]) -> int:
    """Where the words that belong to the noun after `out` begin: at its determiner, else at its adjectives."""
    for back in range(1, min(7, len(out)) + 1):
        if out[-back] in DETERMINERS:
            return len(out) - back
        if out[-back] in ("|", ",", "of") or ((_begins(out[-back]) or out[-back] in LOOSE) and out[-back] not in SHOWN):
            break
    at = len(out)
    while at and out[at - 1] in WHO | WHO_ALONE | SHOWN | MODIFIERS and out[at - 1] != "and":
        at -= 1
    return at


def _items(words: list[str]) -> Iterator[_Item]:
    """The pieces of a sentence: cut before words that begin a clause, at commas and at "and" unless they join two adjectives."""
    piece: list[str] = []
    joined, begun_by = "", ""
    for at, word in enumerate([*words, "|"]):
        following = words[at + 1] if at + 1 < len(words) else ""
        if word in (",", "and") and piece and piece[-1] in MODIFIERS and following in MODIFIERS:
            piece += ["and"] if word == "and" else []
        elif word in ("|", ",", "and"):
            if piece:
                yield _Item(tuple(piece), joined, begun_by)
                joined = ""
            joined = "," if word == "|" or (joined == "," and not piece) else "," if word == "," else "and"
            begun_by = "" if word == "|" else begun_by
            piece = []
        elif _begins(word):
            if piece and not _begins(piece[-1]):
                yield _Item(tuple(piece), joined, begun_by)
                joined, piece = "", []
            begun_by = DOING.get(word, word) if not piece else begun_by
            piece.append(DOING.get(word, word))
        else:
            piece.append(word)


def _joined(items: list[_Item]) -> str:
    """The items that may stay, joined as they were; where something between them went, by a comma."""
    text, gone, after_trait = "", True, False
    for item in items:
        words = _tidied(item.words)
        if not words or _says_who(words) or (after_trait and not item.joined and set(words[1:]) <= BODY | LOOSE):
            after_trait = _says_who(words) if words else after_trait
            gone = True
            continue
        if item.begun_by in ("with", "wearing", "in") and not _begins(words[0]) and gone:
            words = ["wearing" if item.begun_by == "wearing" else "with", *words]       # "with hair in a bun and glasses" is with glasses
        separator = ", " if gone or item.joined == "," else " and " if item.joined == "and" else " "
        text += (separator if text else "") + " ".join(words)
        gone, after_trait = False, False
    return text


def _tidied(words: tuple[str, ...]) -> list[str]:
    """Without adjectives that say who, colours of eyes, and what hangs loose at either end; empty if it is only a picture of somebody."""
    kept = [w for i, w in enumerate(words) if w not in WHO and not (w in MODIFIERS and words[i + 1:i + 2] == ("eyes",))]
    while kept and kept[-1] in LOOSE:
        kept.pop()
    while kept and kept[0] in LOOSE - DETERMINERS and kept[0] not in BEGINS:
        kept.pop(0)
    if set(kept) <= PREPOSITIONS or (set(kept) & PICTURES and set(kept) <= PLAIN | PICTURES | PREPOSITIONS):
        return []
    return kept


def _says_who(words: list[str]) -> bool:
    held = set(words)
    return (bool(held & TRAITS) and not held & WORN_IN_HAIR) or any(noun in held and held & marks for noun, marks in SAYS_WHO_WITH.items()) \
        or any(noun in held and not held & marks for noun, marks in SAYS_WHO_UNLESS.items()) or held <= WHO_ALONE
