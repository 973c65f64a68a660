"""One look at a sample: faces, who it is to each recogniser, defects, what a prompt asked for. The stage `judge` and the benches look with the same eyes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from likeness import gate
from models.captions.slots import SlotReader
from models.faces.face import Picture
from models.faces.tools import FaceTools
from models.quality import findings, measure
from models.quality.unsafe import UnsafeReader, find_unsafe


@dataclass(frozen=True)
class Looker:
    """Whoever looks: the networks, and what is usual for this subject on this base."""

    faces: FaceTools
    slots: SlotReader
    usual: findings.Usual
    safety: UnsafeReader

    def see(self, picture: Picture, *, name: str, category: str, slots: Mapping[str, str]) -> measure.Seen:
        """A sample (H, W, 3), upright RGB.

        Args:
            name: its digest.
            category: of its prompt; paintings are not asked for skin and focus.
            slots: what the prompt asks for.
        """
        faces, second = self.faces.find_faces(picture), self.faces.second
        one = len(faces) == 1
        found = findings.find_defects(picture, faces, self.usual, stylised=category == gate.STYLISED) + find_unsafe(picture, self.safety)
        right, asked = measure.slots_seen(slots, self.slots.read(picture[None])[0]) if slots else (0, 0)
        return measure.Seen(name, category, len(faces), self.faces.embed_faces(picture, faces)[0] if one else None, measure.thumbnail(picture),
                            found, right, asked, second.embed_faces(picture, faces)[0] if one and second is not None else None)
