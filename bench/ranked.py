"""Pictures of a folder ranked by their defects, worst first, on a sheet to be looked at: `python -m bench.ranked FOLDER`.

    python -m bench.ranked FOLDER [--portraits FOLDER] [--base maquette] [--out bench-results]

The order: how many gated findings, how many findings at all, and how far the farthest sign lies from clean pictures, where 0 is their median and 1 the limit.
With --portraits, photos of the person who is meant, limits are theirs. The sheet holds what the folder holds: it is not for the repository.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from likeness.gate import GATED
from likeness.records import FindingCode
from models.diffusion import bases
from models.faces import align
from models.faces.face import Face, Picture
from models.faces.tools import FaceTools, dlib_tools
from models.quality import findings
from models.quality.unsafe import OpenNsfw, find_unsafe

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".pgm"})
TILE_PX, WORDS_PX, ACROSS = 168, 40, 12


@dataclass(frozen=True)
class Ranked:
    """One picture: its findings, and how far its farthest sign lies from clean pictures (0: their median, 1: the limit)."""

    name: str
    picture: Picture
    codes: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    farthest: float
    sign: str
    unsafe: float

    @property
    def place(self) -> tuple[float, ...]:
        """The smaller, the worse."""
        return (-len(GATED & {*self.codes}), -len({*self.codes}), -self.farthest)


def farthest(signs: Mapping[FindingCode, float | None], usual: findings.Usual) -> tuple[float, str]:
    """(how far, which sign), of those that are gated."""
    medians = findings.table()["rows"][0]["medians"]
    found = [((value - medians[code]) / (limit - medians[code]), code) for code, value in signs.items()
             if value is not None and code in GATED and abs((limit := usual.limits[code]) - medians[code]) > 1e-9]
    return max(found, default=(0.0, ""))


def look(path: Path, tools: FaceTools, usual: findings.Usual, reader: OpenNsfw) -> Ranked:
    """One file."""
    with Image.open(path) as opened:
        picture = np.asarray(opened.convert("RGB"))
    faces = tools.find_faces(picture)
    found = (*findings.find_defects(picture, faces, usual), *find_unsafe(picture, reader))
    far, sign = farthest(_signs(picture, faces, usual), usual)
    return Ranked(path.name, picture, tuple(f.code for f in found), tuple(f.box_px for f in found if f.box_px is not None and f.code in GATED), far, sign, reader.unsafe(picture))


def _signs(picture: Picture, faces: Sequence[Face], usual: findings.Usual) -> Mapping[FindingCode, float | None]:
    return findings.signs_of(picture, faces[0], usual.own_skin) if faces else {}


def own_portraits(folder: Path, tools: FaceTools) -> list[Picture]:
    """Aligned crops of photos with one face."""
    crops = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB"))
        if (face := tools.main_face(picture)) is not None:
            crops.append(align.crop(picture, align.fit(face.points), side_px=findings.SIDE_PX))
    return crops


def sheet(ranked: Sequence[Ranked]) -> Image.Image:
    """All of them, worst first, boxes of gated findings drawn, the codes below; * is gated."""
    rows = math.ceil(len(ranked) / ACROSS)
    page = Image.new("RGB", (ACROSS * TILE_PX, rows * (TILE_PX + WORDS_PX)), "white")
    draw = ImageDraw.Draw(page)
    for number, item in enumerate(ranked):
        x, y = number % ACROSS * TILE_PX, number // ACROSS * (TILE_PX + WORDS_PX)
        height, width = item.picture.shape[:2]
        scale = (TILE_PX - 4) / max(height, width)
        page.paste(Image.fromarray(item.picture).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS), (x, y))
        for left, top, right, bottom in item.boxes:
            draw.rectangle((x + left * scale, y + top * scale, x + right * scale, y + bottom * scale), outline="red")
        words = [f"{'*' if code in GATED else ''}{code}" + (f" x{n}" if n > 1 else "") for code, n in Counter(item.codes).items()] or ["-"]
        draw.text((x + 2, y + TILE_PX - 2), "\n".join(" ".join(words[k:k + 3]) for k in range(0, len(words), 3)), fill="black")
    return page


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.ranked", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="pictures, sub-folders included")
    p.add_argument("--portraits", type=Path, help="photos of the person who is meant")
    p.add_argument("--base", help="whose own drawing widens limits: maquette, or none")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    a = p.parse_args()
    cv2.setNumThreads(1)
    tools, reader = dlib_tools(), OpenNsfw()
    usual = findings.usual(own_portraits(a.portraits, tools) if a.portraits else [], base=bases.reference(a.base).revision if a.base else "renders")
    files = sorted(f for f in a.folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        p.error(f"no pictures in {a.folder}: {', '.join(sorted(SUFFIXES))} are read")
    ranked = sorted((look(f, tools, usual, reader) for f in tqdm(files, desc="pictures", disable=None)), key=lambda item: item.place)
    a.out.mkdir(parents=True, exist_ok=True)
    sheet(ranked).save(a.out / "ranked.png")
    rows = [{"name": r.name, "findings": r.codes, "farthest": round(r.farthest, 3), "sign": r.sign, "unsafe": round(r.unsafe, 4)} for r in ranked]
    (a.out / "ranked.json").write_text(json.dumps(rows, indent=1) + "\n")
    counts = Counter(code for r in ranked for code in {*r.codes})
    print(f"{len(ranked)} pictures; with a finding: {dict(counts.most_common())}; with a gated one: {sum(bool(GATED & {*r.codes}) for r in ranked)}")
    beliefs = [r.unsafe for r in ranked]
    print(f"unsafe: median {np.median(beliefs):.4f}, 99 % {np.quantile(beliefs, 0.99):.4f}, largest {max(beliefs):.4f}")
    print(f"sheet {a.out / 'ranked.png'}, numbers beside it")


if __name__ == "__main__":
    main()
