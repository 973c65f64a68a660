"""What says in words what a portrait shows: slots (`models.captions.slots`) or a network that writes sentences (`models.captions.image_to_text`)."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Said = tuple[str, dict[str, str], Literal["slots", "sidecar", "image_to_text"]]      # text, the slots it names, who said it


class Captioner(Protocol):
    """Says what must stay editable in portraits, never who it is."""

    @property
    def wide(self) -> bool:
        """Whether it can be shown wide crops; if not, what the tight crop of a photo shows speaks for the wide one too."""

    def captions(self, crops_NSSC: NDArray[np.uint8], *, who: str) -> list[Said]:
        """A caption of each uint8 RGB crop; `who` stands for the person, e.g. "zqaa woman". The same crops give the same words."""
