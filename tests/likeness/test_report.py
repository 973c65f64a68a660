"""The report: one file that needs nothing else, whatever the words and pictures in it are."""

from __future__ import annotations

import dataclasses
import io
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from likeness.calibration import Calibration, Calibrations, Conditions, Rate
from likeness.errors import RecipeError
from likeness.gate import GatePolicy, judge
from likeness.ladder import Attempt
from likeness.night import Night
from likeness.recipe import Lora
from likeness.records import (
    BaseScores,
    Caption,
    Consent,
    Curve,
    CurvePoint,
    Finding,
    Measurements,
    PhotoJudgement,
    Reason,
    Recogniser,
    Release,
    Sample,
    SampleScore,
    SetJudgement,
    Subject,
    Verdict,
)
from likeness.report import PhotoView, PortraitView, ReportView, SampleView, data_uri, render_contact_sheet, render_night, render_report
from likeness.store import MemoryStore
from tests.likeness.fabricated import BASE, World, build

VOID = {"meta", "img", "br", "image", "use", "rect", "line", "circle", "polyline", "link", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}</style>"


def picture(path: Path | None, colour: int, *, side: int = 96, mode: str = "RGB") -> bytes:
    image = Image.open(path).convert(mode) if path else Image.new(mode, (side, side), colour)
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "WEBP" if path else "PNG")
    return buffer.getvalue()


def scores(count: int, *, seed: int = 0) -> tuple[SampleScore, ...]:
    draw = random.Random(seed)
    return tuple(SampleScore(image=f"{i:064x}", category="style" if i % 4 == 3 else "place", faces=1 if i != 5 else 2, identity_distance=0.65 - 0.4 * x,
                             position=x, nearest_training=0.2 if i != 2 else 0.01, slots_right=2, slots_asked=3)
                 for i in range(count) for x in [round(0.55 + 0.4 * draw.random(), 3)])


def whole_view(files: list[Path] | None = None, *, words: str = "a photo of sks woman smiling, in a park") -> ReportView:
    """A run that reached everything; `files` are pictures to show, plain colours without."""
    world: World = build(MemoryStore(), photos=5)

    def shown(i: int, *, side: int = 96) -> bytes:
        return picture(files[i % len(files)] if files else None, 40 * i, side=side)
    made = scores(16)
    measured = Measurements(backend="dlib", bank="a" * 64, threshold=0.45, ceiling=0.25, floor=0.65, usable_portraits=8, scores=made)
    policy = GatePolicy(min_editability_share=0.0, min_diversity_share=0.0, max_drift_share=1.0)        # nobody measured the base
    prompts = [("place", "a photo of sks woman on a beach"), ("clothes", words), ("light", "a photo of sks woman, neon light"), ("style", "a painting of sks woman")]
    judged = [PhotoJudgement(name=f"holiday/{i}.jpg", verdict="accept", reason=None, message="used") for i in range(5)]
    judged += [PhotoJudgement(name="group.jpg", verdict="reject", reason="many_faces", message="4 faces were found: crop the picture to one person"),
               PhotoJudgement(name=words, verdict="normalise", reason="rotated", message="turned upright as its orientation says"),
               PhotoJudgement(name="notes.pdf", verdict="ignore", reason="no_picture", message="not a picture")]
    mask = io.BytesIO()
    radial = Image.radial_gradient("L").resize((96, 96)).point(lambda v: 255 if v < 110 else 0)
    radial.save(mask, "PNG")
    losses = tuple((5 * i, 0.18 + 0.25 / (1 + i) + 0.04 * random.Random(i).random()) for i in range(1, 41))
    release = Release(subject="ada", model="likeness.ada", version=3, adapter=world.adapter.digest, verdict=world.verdict.digest)
    return ReportView(
        subject=Subject(id="ada", noun="woman", consent=Consent(source="operator")),
        photos=tuple(PhotoView(j, None if j.verdict == "ignore" else shown(i)) for i, j in enumerate(judged)),
        set_judgement=SetJudgement(verdict="ok", reason=None, message="Enough good photos.", advice=("Add one with another light.",)),
        portraits=tuple(PortraitView(p, shown(i), mask.getvalue(), Caption(portrait=p.digest, text=words, source="sidecar"), held_out=i == 4)
                        for i, p in enumerate((*world.training_set.portraits, *world.training_set.held_out))),
        recipe=world.recipe, base=BASE, adapter=world.adapter.model_copy(update={"losses": losses}),
        samples=tuple(SampleView(Sample(adapter=world.adapter.digest, prompt=prompts[i % 4][1], category=prompts[i % 4][0], seed=i // 4,
                                        image=world.samples.samples[0].image.model_copy(update={"sha256": s.image})), shown(i + 3), s)
                      for i, s in enumerate(made)),
        measured=measured, policy=policy, verdict=judge(measured, policy), release=release, code="0.1.0+g" + "c" * 40, reused=("ingest",),
        lineage={"ok": True, "chain": [{"stage": p.stage, "key": p.key, "digest": p.digest, "verified": True} for p in world.published.values()]},
        seconds={"ingest": 0.4, "crop": 3.2, "caption": 1.1, "train": 71.0, "sample": 34.5, "judge": 5.5})


class Reader(HTMLParser):
    """Collects tags, attributes and text, and insists that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def references(reader: Reader) -> Iterator[str]:
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "mask", "background"):
                yield value or ""


@pytest.mark.parametrize("words", ["a photo", HOSTILE], ids=["plain", "hostile"])
def test_it_parses_and_refers_to_nothing_outside(words: str) -> None:
    html = render_report(whole_view(words=words))
    reader = read(html)
    found = list(references(reader))
    assert len(found) > 30
    assert all(reference.startswith(("data:image/", "#", "url(#")) for reference in found)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in re.sub(r'mask="url\(#mask\d+\)"', "", html)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}


def calibrations(**row: object) -> Calibrations:
    whole = {"threshold": "min_identity_share", "value": 0.4, "data": "sets of 14", "false_accept": Rate.of([(1, 50)] * 20), "false_refusal": Rate.of([(1, 40), (0, 40)])} | row
    return Calibrations(conditions=Conditions(thresholds="0" * 64, recogniser="dlib", second=None, bank="b", base="maquette", revision="1", drawn="0" * 64, slots="0" * 64, usual="0" * 64, unsafe="n", epoch=5),
                        date="2026-01-02", command="c", people=24, pictures=300, source="0" * 64, left_out=0,
                        rows=(Calibration.model_validate(whole), Calibration(threshold="max_drift_share", value=1.0, data="", unmeasured="a share of 1 asks nothing")))


def test_rates_stand_beside_each_limit() -> None:
    view = dataclasses.replace(whole_view(), calibrations=calibrations(), calibrated="measured on 300 pictures of 24 people")
    words = " ".join(read(render_report(view)).text.split())
    row = calibrations().rows[0]
    assert row.words.startswith("wrongly let through 2 % (") and row.false_accept and row.false_refusal
    assert words.count(row.words) == 1, "beside its bar"
    assert f"min identity share0.4{row.false_accept.words}{row.false_refusal.words}sets of 14" in words, "and in the table"
    assert "max drift share1not measured: a share of 1 asks nothing" in words
    assert "measured on 300 pictures of 24 people" in words


def test_where_nobody_calibrated_the_report_says_so() -> None:
    words = " ".join(read(render_report(dataclasses.replace(whole_view(), calibrated="nobody calibrated these thresholds here: what was measured is of another recogniser"))).text.split())
    assert "Nobody calibrated these thresholds here: what was measured is of another recogniser." in words
    assert "wrongly" not in words


def test_hostile_words_stay_words() -> None:
    reader = read(render_report(whole_view(words=HOSTILE)))
    assert reader.text.count(HOSTILE) >= 7          # five captions, a file name and a prompt, each as it was written
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert sum(tag == "style" for tag, _ in reader.tags) == 1


def test_every_reason_and_judgement_appears() -> None:
    reasons = tuple(Reason(code=f"code_{i}", message=f"the test number {i} failed", value=0.1 * i, needed=0.5) for i in range(6))
    view = whole_view()
    assert view.verdict is not None
    verdict = Verdict(**(dict(view.verdict) | {"kind": "retry", "reasons": reasons}))
    reader = read(render_report(ReportView(**(vars(view) | {"verdict": verdict}))))
    for reason in reasons:
        assert reason.message in reader.text
        assert reason.code in reader.text
    for photo in view.photos:
        assert photo.judgement.name in reader.text
        if photo.judgement.verdict != "accept":
            assert photo.judgement.message in reader.text
            assert str(photo.judgement.reason) in reader.text


def test_it_shows_numbers_prompts_lineage_and_recipe() -> None:
    view = whole_view()
    text = read(render_report(view)).text
    assert view.verdict is not None
    assert view.verdict.kind == "accepted"
    for expected in ("Accepted", "likeness.ada version 3", "repeats a training photo", "2 faces", "held out", "71.0 s", "400 ms", "found published",
                     "learning rate", str(Lora().learning_rate), "min snr", "Every link holds", "step 200", "Enough good photos.", "Add one with another light."):
        assert expected in text, expected
    assert "6 of 8 files are used" in text
    assert all(link["key"][:12] in text for link in view.lineage["chain"]) if view.lineage else False


def test_dots_lie_where_the_scores_are() -> None:
    view = whole_view()
    reader = read(render_report(view))
    dots = sorted(float((a["cx"] or "").rstrip("%")) for tag, a in reader.tags if tag == "circle")
    assert view.measured is not None
    assert dots == pytest.approx(sorted(100 * s.position for s in view.measured.scores if s.position is not None), abs=0.01)
    line = next(a for tag, a in reader.tags if tag == "line")
    assert float((line["x1"] or "").rstrip("%")) == pytest.approx(50.0)      # threshold 0.45 between 0.65 and 0.25: above min_position 0.45


def test_every_picture_has_a_text() -> None:
    reader = read(render_report(whole_view()))
    assert all(a.get("alt") for tag, a in reader.tags if tag == "img")
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for tag, a in reader.tags if tag == "svg")


@pytest.mark.parametrize("stops_at", ["intake", "training", "unmeasured"])
def test_a_run_that_stopped_early_has_a_report_too(stops_at: str) -> None:
    full = vars(whole_view())
    keep = {"intake": ["subject", "photos", "set_judgement"],
            "training": ["subject", "photos", "portraits", "recipe", "adapter"],
            "unmeasured": [name for name in full if name not in ("policy", "measured")]}[stops_at]
    view = {name: full[name] for name in keep}
    if stops_at == "unmeasured":
        view["samples"] = tuple(SampleView(s.sample, s.image) for s in full["samples"])
    text = read(render_report(ReportView(**view))).text
    assert ("Not judged" in text) == (stops_at != "unmeasured")
    assert ("not measured" in text) == (stops_at == "unmeasured")


def test_it_is_a_pure_function() -> None:
    assert render_report(whole_view()) == render_report(whole_view())


def test_only_pictures_are_embedded() -> None:
    with pytest.raises(RecipeError, match="PNG, WebP or JPEG is needed"):
        data_uri(b"<svg onload=alert(1)>")


def test_it_shows_rendered_people(rendered_users: Path) -> None:
    files = sorted((rendered_users / "900000").glob("*.jpg"))
    html = render_report(whole_view(files))
    assert html.count("data:image/webp;base64,") >= 25
    read(html)


def test_the_base_alone_stands_beside_what_the_adapter_reaches_and_is_left_out_where_nobody_measured_it() -> None:
    view = whole_view()
    assert view.measured is not None
    assert view.policy is not None
    measured = view.measured.model_copy(update={"diversity": 0.15})
    base = BaseScores(revision="1", battery="e" * 64, steps=20, guidance=3.0, noun="woman", samples=64, one_face_share=0.97, editability=0.41, by_category={"place": 0.41},
                      slots={"place": (7, 17)}, diversity=0.2, spread=0.16)
    view = ReportView(**(vars(view) | {"verdict": judge(measured, view.policy)}))
    text = read(render_report(ReportView(**(vars(view) | {"base_scores": base})))).text
    for expected in ("base alone 97\u00a0%", "base alone 41\u00a0%", "Prompt details followed", "75\u00a0%"):
        assert expected in text, expected
    alone = read(render_report(view)).text
    assert "base alone" not in alone
    assert "Prompt details followed" in alone


def test_the_choice_of_the_checkpoint_is_drawn_and_in_numbers() -> None:
    view = whole_view()
    assert view.adapter is not None
    plain = render_report(view)
    points = tuple(CurvePoint(step=s, identity=i, obedience=o, samples=8) for s, i, o in ((50, 0.25, 0.75), (100, 0.5, 0.625), (150, 0.4, None), (200, 0.75, 0.25)))
    adapter = view.adapter.model_copy(update={"curve": Curve(points=points, chosen=100, stopped=True, witnesses=("a" * 64,))})
    html = render_report(ReportView(**(vars(view) | {"adapter": adapter})))
    reader = read(html)
    drawn = [(a["cx"], a["cy"], a["class"]) for tag, a in reader.tags if tag == "circle" and str(a.get("cy")).endswith("%")]
    assert drawn == [("25.00%", "25.00%", "dot stylised"), ("50.00%", "37.50%", "dot yes"), ("75.00%", "75.00%", "dot stylised")]
    assert "step 100: likeness 50\u00a0%, obedience 62\u00a0%, chosen; step 200" in html
    for expected in ("Choice of the checkpoint", "15040\u00a0%not measured", "ended early", "1 of the held-out portraits had a part"):
        assert expected in reader.text, expected
    assert "Choice of the checkpoint" not in plain
    unmeasured = Curve(points=(CurvePoint(step=200, identity=None, obedience=None, samples=8),), chosen=200)
    bare = render_report(ReportView(**(vars(view) | {"adapter": view.adapter.model_copy(update={"curve": unmeasured})})))
    assert len(read(bare).tags) < len(reader.tags)
    assert "ended early" not in bare


def test_what_is_held_against_the_base_and_what_a_second_recogniser_says_is_shown() -> None:
    view = whole_view()
    assert view.measured is not None
    policy = GatePolicy(max_drift_share=0.25)
    place = {"place": (20, 40), "style": (10, 20)}
    base = BaseScores(revision="1", battery="e" * 64, steps=20, guidance=3.0, noun="woman", samples=64, one_face_share=1.0, editability=0.5, by_category={"place": 0.5},
                      slots=place, diversity=0.2, spread=0.16)
    two = Recogniser(backend="insightface-0", bank="b" * 64, threshold=0.5, ceiling=0.21, floor=0.73)
    made = [s.model_copy(update={"second_distance": 0.3, "second_position": 0.77}) for s in view.measured.scores]
    bare = [made[0].model_copy(update={"image": "9" * 64, "slots_right": 0, "slots_asked": 0}), made[1].model_copy(update={"image": "8" * 64, "identity_distance": 0.64, "position": 0.02})]
    apart = tuple(tuple(0.12 for _ in range(i)) for i in range(len(made)))
    measured = view.measured.model_copy(update={"second": two, "scores": tuple(made), "bare": tuple(bare), "base": base, "apart": apart})
    verdict = judge(measured, policy)
    nobody = tuple(SampleView(view.samples[i].sample.model_copy(update={"prompt": "a photo of a woman", "image": view.samples[i].sample.image.model_copy(update={"sha256": s.image})}),
                              view.samples[i].image, s) for i, s in enumerate(bare))
    shown = ReportView(**(vars(view) | {"measured": measured, "policy": policy, "verdict": verdict, "base_scores": base, "bare": nobody,
                                        "samples": tuple(dataclasses.replace(item, score=s) for item, s in zip(view.samples, made, strict=True))}))
    text = " ".join(read(render_report(shown)).text.split())
    for expected in ("Prompt details followed67 % · at least", "This person where nobody was asked for50 % · at most 25 %",
                     "Diversity of samples that are this person, of what the base alone draws75 % · at least 30 %",
                     "insightface-0, must agree: to it strangers are at 0.73, own photos at 0.21", "second opinion 77 %", "nobody in particular", "must not be this person"):
        assert expected in text, expected
    assert text.count("must not be this person") == 1
    unasked = " ".join(read(render_report(ReportView(**(vars(shown) | {"policy": GatePolicy()})))).text.split())      # shown, and nobody is blamed
    assert "must not be this person" not in unasked
    assert unasked.count("is this person") > text.count("is this person")
    assert unasked.count("✗ fails") == text.count("✗ fails") - 1
    alone = read(render_report(view)).text
    assert "second opinion" not in alone and "nobody in particular" not in alone


def test_findings_are_drawn_where_they_are_and_say_whether_they_count() -> None:
    view = whole_view()
    findings = (Finding(code="blur", score=-1.4, threshold=-1.06, box_px=(32.0, 16.0, 96.0, 112.0)),
                Finding(code="plastic_skin", score=0.1, threshold=0.35, box_px=(32.0, 16.0, 96.0, 112.0)),
                Finding(code="colour_cast", score=50.0, threshold=40.0, box_px=(0.0, 0.0, 64.0, 64.0)), Finding(code="unmeasured", of="grid"))
    first = view.samples[0]
    assert first.score is not None and view.measured is not None
    spoilt = SampleView(first.sample, first.image, first.score.model_copy(update={"findings": findings}), size_px=(128, 256))
    html = render_report(ReportView(**(vars(view) | {"samples": (spoilt, *view.samples[1:])})))
    reader = read(html)
    boxes = [a for tag, a in reader.tags if tag == "rect" and "flaw" in (a.get("class") or "")]
    assert [(b["class"], b["x"], b["y"], b["width"], b["height"]) for b in boxes] == [("flaw", "25.00", "6.25", "50.00", "37.50"), ("flaw mild", "0.00", "0.00", "50.00", "25.00")]
    assert [a["aria-label"] for tag, a in reader.tags if tag == "svg" and (a.get("aria-label") or "").startswith("Where")] == ["Where: blur, plastic skin; colour cast"]
    for expected in ("blur -1.4, below -1.06", "plastic skin 0.1, below 0.35 (reported only)", "colour cast 50, above 40 (reported only)", "unmeasured: grid", "Samples with a defect"):
        assert expected in reader.text, expected
    assert reader.text.count("\u2717 fails") == read(render_report(view)).text.count("\u2717 fails") + 1


def test_of_a_picture_that_is_covered_the_page_says_so_and_of_no_other() -> None:
    view, unsafe = whole_view(), Finding(code="unsafe", score=0.9, threshold=0.5, box_px=(0.0, 0.0, 96.0, 96.0))
    first = view.samples[0]
    assert first.score is not None
    spoilt = SampleView(first.sample, first.image, first.score.model_copy(update={"findings": (unsafe,)}), size_px=first.size_px)
    text = read(render_report(ReportView(**(vars(view) | {"samples": (spoilt, *view.samples[1:]), "bare": (spoilt,)})))).text
    assert text.count("not shown here") == 2
    assert "unsafe 0.9, above 0.5" in text
    assert "not shown here" not in read(render_report(view)).text


def test_attempts_stand_side_by_side_only_where_there_are_several() -> None:
    view = whole_view()
    assert view.verdict is not None
    refused = view.verdict.model_copy(update={"kind": "retry", "scores": view.verdict.scores | {"identity_share": 0.123, "copy_share": None}})
    attempts = (Attempt(Lora(), refused, "the first"), Attempt(Lora(steps=400), view.verdict, f"steps 400 {HOSTILE}"))
    reader = read(render_report(ReportView(**(vars(view) | {"attempts": attempts, "chosen": 1}))))
    for expected in ("attempt 2, counts", "Not yet", "the first", f"steps 400 {HOSTILE}", "12\u00a0%", "not measured", "Recognisably this person"):
        assert expected in reader.text, expected
    assert not {tag for tag, _ in reader.tags} & {"script"}
    assert "attempt 1" not in read(render_report(ReportView(**(vars(view) | {"attempts": attempts[1:]})))).text


@pytest.mark.parametrize("how", [None, "run the same command with `--attempts 2`"])
def test_a_refusal_says_what_comes_next_and_how(how: str | None) -> None:
    text = read(render_report(ReportView(**(vars(whole_view()) | {"following": {"why": "steps 400 (was 200)", "how": how}})))).text
    assert "Next: steps 400 (was 200)." in text
    assert ("To allow it, run the same command with `--attempts 2`." in text) == (how is not None)
    assert "Next:" not in read(render_report(whole_view())).text


@pytest.mark.parametrize("verdict", ["ok", "reject"])
def test_the_contact_sheet_shows_every_file_with_its_reason_and_refers_to_nothing_outside(verdict: str) -> None:
    photos = whole_view(words=HOSTILE).photos
    judgement = SetJudgement(verdict=verdict, reason=None if verdict == "ok" else "too_few_photos", message="what the set is", advice=("Add one with another light.",))
    html = render_contact_sheet(photos, judgement, expected="about 70% of sets like this are accepted", code="0.1.0")
    reader = read(html)
    for photo in photos:
        assert photo.judgement.name in reader.text
        if photo.judgement.verdict != "accept":
            assert photo.judgement.message in reader.text
    assert "what the set is" in reader.text
    assert "About 70% of sets like this are accepted." in reader.text
    assert "Add one with another light." in reader.text
    assert ("can be used" in reader.text) == (verdict == "ok")
    assert all(r.startswith("data:image/") for r in references(reader))
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe"}


def test_a_night_shows_its_numbers_in_the_order_in_which_they_matter() -> None:
    counts = {"unchanged": 40, "failed": 2, "accepted": 7, "retry": 0, "deferred": 1}
    night = Night(night="2026-11-26", counts=counts, seconds={"train": 120.0, "sample": 30.0}, ok=True, reasons={"few_faces": 3}, took_s=180.0)
    page = render_night(night, code="1.0")
    words = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL))
    places = [words.index(text) for text in ("The night went well", "50 enrolled, 7 accepted", "accepted 7", "failed 2", "left for another night 1", "nothing new 40",
                                             "few faces 3", "train 2 min 0 s", "sample 30.0 s")]
    assert places == sorted(places)
    assert "not yet" not in words                                # nobody had that verdict
    assert "took 3 min 0 s" in words


@pytest.mark.parametrize("night", [Night(night="n", counts={}, seconds={}, ok=False), Night(night="n", counts={HOSTILE: 1}, seconds={HOSTILE: 1.0}, ok=False, reasons={HOSTILE: 1})])
def test_a_night_of_nobody_or_of_hostile_words_is_a_page(night: Night) -> None:
    page = render_night(night, code=HOSTILE)
    assert "Too many failed" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "http://" not in page
