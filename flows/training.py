"""training: TrainingSets to Adapters and samples, on a worker with a GPU: the base is loaded once for all of them.

A parameter holds ids, digests and recipes. The Store is read for portraits and captions and takes adapters and samples; photos are not touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.batches import told
from flows.personalize import Run
from flows.preparing import alone
from likeness.recipe import RECIPE
from likeness.stages import StageRef
from models.diffusion.device import check_device
from tasks.sampling import sample_battery
from tasks.training import train


def _name_of_run() -> str:
    return f"training {len(flow_run.parameters['trainings'])}"


@flow(name="training", flow_run_name=_name_of_run, persist_result=False, validate_parameters=False)
def training(trainings: Sequence[Mapping[str, Any]]) -> Any:
    """Train and sample, one subject after the other; what goes wrong with one is theirs alone, unless the device does not compute any more.

    Args:
        trainings: `{"subject","training_set","recipe","more"}` each: an id, the reference of a TrainingSet, a recipe, and how many seeds of each prompt are drawn besides (none, if
            that is left out).

    Returns:
        A state that says how many seconds each stage took and how many failed, by code.

    Raises:
        ResourceError: the device is broken: another process takes the rest.
    """
    seconds, failed = Counter[str](), Counter[str]()
    for asked in trainings:
        run, before = Run(asked["subject"]), failed.total()
        with alone(failed):
            training_set = StageRef.model_validate(asked["training_set"])
            recipe = RECIPE.validate_python(asked["recipe"], strict=False)
            adapter = run.make(train, run.subject, training_set, recipe)
            run.make(sample_battery, run.subject, training_set, adapter, recipe)
            if asked.get("more"):
                run.make(sample_battery, run.subject, training_set, adapter, recipe, asked["more"], again=True)
        seconds.update(run.seconds)
        if failed.total() > before:
            check_device()
    return Completed(message=told(seconds, failed))
