"""Recipes: everything that decides a training, as one frozen union, discriminated by `method`.

Two equal recipes have one digest; an impossible combination cannot be written; an unknown key is refused by name. A method is one class
here and one module in `models.diffusion`. The defaults are the maquette's; what another base needs is in `PRESETS`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, field_validator, model_validator

from likeness.records import Record

DECODER_RATE = 5e-4
Target = Literal["attention", "convolution", "text_encoder"]


class InversionObjective(Record):
    """What is minimised where only words are trained. Class pictures and empty captions hold no such word and would teach it nothing."""

    min_snr: float = Field(5.0, gt=0, le=1000, description="min-SNR gamma (arXiv 2303.09556); 1000 switches the weighting off")
    background_weight: float = Field(0.3, ge=0, le=1, description="weight of the loss outside the face mask: the person counts, the room less")
    noise_offset: float = Field(0.0, ge=0, le=0.2, description="0: a zero-terminal-SNR base does not need it")

    @property
    def wants_class_pictures(self) -> bool:
        """Whether pictures of the class are trained on beside the portraits."""
        return False


class Objective(InversionObjective):
    """What is minimised. What the maquette's presets say otherwise is in `PRESETS`."""

    prior: Literal["class_pictures", "dop"] = Field(
        "class_pictures", exclude_if=lambda value: value == "class_pictures",      # so recipes from before there was a choice keep their digest
        description="what the class is kept with: class pictures, or differential output preservation (the same portraits under captions without the trigger, "
                    "aimed at what the base alone returns), which needs no class pictures and costs less likeness: docs/methods.md")
    prior_weight: float = Field(0.25, ge=0, le=10, description="weight of what keeps the class, beside 1 for the portraits; 0: nothing does, as in the maquette's presets. docs/methods.md")
    caption_dropout: float = Field(0.0, ge=0, le=0.5, description="share of empty captions, which are said to keep guidance working; 0.1 helped no measure on six users: docs/methods.md")

    @property
    def wants_class_pictures(self) -> bool:
        """Whether pictures of the class are trained on beside the portraits."""
        return self.prior_weight > 0 and self.prior == "class_pictures"

    def for_words(self) -> InversionObjective:
        """The part that means something while only words are trained."""
        return InversionObjective(min_snr=self.min_snr, background_weight=self.background_weight, noise_offset=self.noise_offset)


class Choice(Record):
    """Which checkpoint becomes the adapter: several are scored on a few pictures each, and the knee of the curve is taken (`likeness.choice`)."""

    points: int = Field(0, ge=0, le=50, description="checkpoints that are scored, evenly spaced, the last step among them; 0: the last step it is, unscored")
    first: float = Field(0.5, gt=0, le=1, description="share of the steps at which the first of them lies")
    seeds: int = Field(1, ge=1, le=16, description="pictures of each prompt of the battery for one score, each with a seed of its own that the battery does not use")
    denoising_steps: int = Field(10, ge=1, le=1000, description="of these pictures")

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if not self.points and self != Choice.model_construct():
            raise ValueError("first, seeds and denoising_steps are for a recipe with points")
        return self

    def at(self, steps: int) -> tuple[int, ...]:
        """The steps, of so many, whose checkpoints are scored, each once; the last is `steps`. Empty where nothing is."""
        if self.points < 2:
            return (steps,) * self.points
        shares = (self.first + (1 - self.first) * number / (self.points - 1) for number in range(self.points))
        return tuple(sorted({max(1, round(steps * share)) for share in shares}))


class Training(Record):
    """What every method is told."""

    base: str = Field("maquette", description="name in the catalogue of bases")
    steps: int = Field(200, ge=1, le=20_000)
    batch: int = Field(4, ge=1, le=64)
    learning_rate: float = Field(gt=0, le=1.0)
    max_grad_norm: float = Field(1.0, gt=0, le=100)
    checkpoint_every: int = Field(50, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    # excluded where they say nothing, so that recipes from before there was a decoder to tune keep their digest
    decoder_steps: int = Field(0, ge=0, le=5000, exclude_if=lambda value: value == 0, description="steps in which the VAE's decoder learns the portraits, apart "
                               "from the method; 0 leaves it alone. For bases whose VAE is too coarse for a face, such as the maquette's")
    decoder_learning_rate: float = Field(DECODER_RATE, gt=0, le=0.1, exclude_if=lambda value: value == DECODER_RATE, description="of the decoder")
    choice: Choice = Field(Choice(), exclude_if=lambda value: value.points == 0)

    @model_validator(mode="after")
    def _rate_of_something(self) -> Self:
        if not self.decoder_steps and self.decoder_learning_rate != DECODER_RATE:
            raise ValueError("decoder_learning_rate is for a recipe with decoder_steps")
        return self


class LowRank(Record):
    """Low-rank factors (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=256)
    alpha: float = Field(16.0, gt=0, le=1024, description="scale of the update is alpha / rank")
    targets: tuple[Target, ...] = Field(("attention", "convolution"), min_length=1, description="the maquette draws faces in its convolutions; "
                                        "text_encoder besides them is an option, not measured")
    min_rank: int | None = Field(None, ge=1, le=256, exclude_if=lambda value: value is None, description="so many ranks of the UNet's factors act at the noisiest timestep, "
                                 "all at the cleanest, in between in proportion (T-LoRA, arXiv 2507.05964); without it all act always. docs/methods.md")

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError(f"min_rank of at most rank, which is {self.rank}; {self.min_rank} is more")
        return self

    @field_validator("targets")
    @classmethod
    def _in_the_unet(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if set(targets) == {"text_encoder"}:
            raise ValueError("attention, convolution or both; text_encoder comes beside them, not instead")
        return targets


class NewWords(Record):
    """New vectors for the trigger (arXiv 2208.01618), first equal to the class noun's."""

    vectors: int = Field(4, ge=1, le=16, description="tokens that the trigger stands for; each takes one from the end of a long caption; not measured")
    norm_slack: float = Field(0.2, ge=0, lt=1, description="how far the norm of a vector may be from the median of the vocabulary, as a share of it: nine "
                              "in ten of the maquette's words lie between -8 % and +18 %")


class DreamBooth(Training):
    """DreamBooth (arXiv 2208.12242): every weight of the UNet, under the trigger."""

    method: Literal["dreambooth"] = "dreambooth"
    learning_rate: float = Field(3e-4, gt=0, le=1.0, description="on one user AUC 0.90, at 1e-4 0.85; `lora` 0.92: docs/log.md, 2026-11-26")
    checkpoint_every: int = Field(100, ge=1, description="a checkpoint holds weights and two moments, 12 bytes for each weight: 144 MB on the maquette")
    text_encoder: bool = Field(False, description="also every weight of the text tower, at the same rate; not measured")
    objective: Objective = Objective()


class Lora(LowRank, Training):
    """DreamBooth with low-rank factors in the UNet and, where `targets` names it, in the text tower."""

    method: Literal["lora"] = "lora"
    learning_rate: float = Field(3e-3, gt=0, le=1.0, description="on two users AUC rose from 0.73 and 0.92 at 1.5e-3 to 0.86 and 0.96: docs/log.md, 2026-11-24")
    objective: Objective = Objective()


class TextualInversion(NewWords, Training):
    """Textual Inversion (arXiv 2208.01618): the trigger's vectors and nothing else."""

    method: Literal["textual_inversion"] = "textual_inversion"
    learning_rate: float = Field(5e-3, gt=0, le=1.0, description="on one user AUC 0.64, as at 2e-2; the base alone 0.55: docs/log.md, 2026-11-26")
    objective: InversionObjective = InversionObjective()


class Pivotal(NewWords, LowRank, Training):
    """Pivotal tuning (arXiv 2106.05744 does it to a GAN): the trigger's vectors alone, then low-rank factors together with them."""

    method: Literal["pivotal"] = "pivotal"
    steps: int = Field(300, ge=1, le=20_000, description="as many for the factors as `lora` has, and half as many before them: on one user AUC 0.95 "
                       "against 0.92 of `lora`: docs/log.md, 2026-11-26")
    learning_rate: float = Field(3e-3, gt=0, le=1.0, description="of the factors: that of `lora`; others were not tried")
    vectors_learning_rate: float = Field(5e-3, gt=0, le=1.0, description="of the vectors: that of `textual_inversion`; others were not tried")
    inversion_share: float = Field(1 / 3, gt=0, lt=1, description="share of the steps that train the vectors alone; others were not tried")
    objective: Objective = Objective()

    @property
    def pivot(self) -> int:
        """The first step of the factors."""
        return min(round(self.steps * self.inversion_share), self.steps - 1)


Recipe = Annotated[DreamBooth | Lora | TextualInversion | Pivotal, Field(discriminator="method")]
RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
METHODS: Mapping[str, type[Training]] = {kind.model_fields["method"].default: kind for kind in get_args(get_args(Recipe)[0])}

# What differs from the defaults of the classes. The maquette's VAE moves a face by 0.39 in dlib's metric; 100 steps on a subject's portraits take held-out
# photos of four users from 0.35-0.47 to 0.27-0.36 from the person, 300 no further: docs/log.md, 2026-11-26. Textual Inversion stays what its name says.
# On other bases none of it was measured. Rates, batches and steps are those of the examples in
# huggingface/diffusers: for SD 1.5 at 512 px examples/dreambooth/README.md and examples/textual_inversion/README.md, for SDXL at 1024 px their
# README_sdxl.md (their accumulated batches of 4 are a batch of 4 here, and 5e-4 for words is scaled by it); full DreamBooth on SDXL, for which there is
# no example, has the numbers of SD 1.5. Pivotal tuning is words and factors one after the other. The class is kept by output preservation, at the
# weight that the examples give class pictures: pictures of the class would have to be this base's own, and the ones that ship are the maquette's. The maquette
# keeps no class: of what could keep it, class pictures cost likeness, and output preservation helped no measure of four users: docs/methods.md.
PRIOR_WEIGHTS: Mapping[str, float] = {"class_pictures": Objective.model_fields["prior_weight"].default, "dop": 1.0}          # of a prior that is named without one
PRESERVATION: Mapping[str, Any] = {"prior": "dop", "prior_weight": PRIOR_WEIGHTS["dop"]}
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "maquette": {"textual_inversion": {}, **{method: {"decoder_steps": 100, "objective": {"prior_weight": 0.0}} for method in ("dreambooth", "lora", "pivotal")}},
    "sd15": {
        "dreambooth": {"steps": 800, "batch": 1, "learning_rate": 5e-6, "checkpoint_every": 400, "objective": PRESERVATION},
        "lora": {"steps": 500, "batch": 1, "learning_rate": 1e-4, "targets": ["attention"], "checkpoint_every": 100, "objective": PRESERVATION},
        "textual_inversion": {"steps": 3000, "batch": 4, "learning_rate": 2e-3, "checkpoint_every": 500},
        "pivotal": {"steps": 1000, "batch": 1, "learning_rate": 1e-4, "vectors_learning_rate": 2e-3, "inversion_share": 0.5, "targets": ["attention"],
                    "checkpoint_every": 100, "objective": PRESERVATION},
    },
    "sdxl": {
        "dreambooth": {"steps": 800, "batch": 1, "learning_rate": 5e-6, "checkpoint_every": 400, "objective": PRESERVATION},
        "lora": {"steps": 500, "batch": 4, "learning_rate": 1e-4, "targets": ["attention"], "checkpoint_every": 100, "objective": PRESERVATION},
        "textual_inversion": {"steps": 500, "batch": 4, "learning_rate": 2e-3, "checkpoint_every": 100},
        "pivotal": {"steps": 1000, "batch": 4, "learning_rate": 1e-4, "vectors_learning_rate": 2e-3, "inversion_share": 0.5, "targets": ["attention"],
                    "checkpoint_every": 100, "objective": PRESERVATION},
    },
}


def preset(method: str, base: str) -> dict[str, Any]:
    """Plain values of the preset of (method, base): method, base, and what is not the default of the method's class."""
    return {**copy.deepcopy(dict(PRESETS.get(base, {}).get(method, {}))), "method": method, "base": base}
