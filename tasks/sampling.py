"""sample: an Adapter meets the battery."""

from __future__ import annotations

from prefect import task

from likeness.once import Claim
from likeness.recipe import RECIPE, Recipe
from likeness.records import Adapter, BatteryPrompt, Sample, SampleSet, TrainingSet
from likeness.settings import Battery
from likeness.stages import Call, StageRef
from models.diffusion import checkpoint
from models.diffusion.methods import adapted
from models.diffusion.sampler import sample
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime
from tasks.training import weights_of

BARE = "bare"          # category of samples of the class noun alone


@task(name="sample", task_run_name="sample {subject}", **RETRIED)
def sample_battery(subject: str, training_set: StageRef, adapter: StageRef, recipe: Recipe, more: int = 0) -> Outcome:
    """One picture for each prompt and seed of the battery, and a few of the class noun alone; or, with `more`, so many seeds of each prompt that the battery has not."""
    tools = runtime()
    battery, sampling = tools.settings.battery, tools.settings.sampling
    call = Call(stage="sample", subject=subject, inputs=(adapter,),
                params={"battery": battery.plain(), "sampling": sampling.plain(), "recipe": recipe.plain(), "base": tools.base_ref.digest} | ({"more": more} if more else {}))
    return tools.once(call, lambda claim: _sample(tools, call, tools.open(training_set, subject, TrainingSet), tools.open(adapter, subject, Adapter),
                                                  battery, claim), SampleSet)


def _sample(tools: Tools, call: Call, training_set: TrainingSet, adapter: Adapter, battery: Battery, claim: Claim) -> SampleSet:
    base, sampling = tools.base, tools.settings.sampling
    tensors, _ = checkpoint.read_adapter(weights_of(tools.store, adapter))
    who = f"{training_set.trigger} {training_set.noun}"
    bare = BatteryPrompt(category=BARE, template="a photo of a {who}")
    more = call.params.get("more", 0)
    own = [(prompt, seed) for prompt in battery.prompts for seed in range(battery.seeds, battery.seeds + more)] if more else battery.every()
    alone = range(0 if more else sampling.bare)
    wanted = [(prompt, prompt.text(who), seed) for prompt, seed in own] + [(bare, bare.text(training_set.noun), seed) for seed in alone]
    tell = tools.progress(call.stage, len(wanted))

    def progress(done: int, total: int) -> None:
        tell(done, "")
        claim.beat(f"sample {done} of {total}")

    with adapted(base, tensors, RECIPE.validate_python(call.params["recipe"], strict=False)):
        images = sample(base, [text for _, text, _ in wanted], [seed for _, _, seed in wanted], steps=sampling.steps,
                        guidance=sampling.guidance, batch=sampling.batch, progress=progress)
    samples = tuple(Sample(adapter=adapter.digest, prompt=text, category=prompt.category, slots=prompt.slots, seed=seed,
                           image=pictures.put(tools.store, f"subjects/{call.subject}/samples", image))
                    for (prompt, text, seed), image in zip(wanted, images, strict=True))
    return SampleSet(adapter=adapter.digest, battery=battery.digest, samples=samples[:len(own)], bare=samples[len(own):])
