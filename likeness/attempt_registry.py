"""The ladder of a subject in MLflow: one run for all attempts on a training set, and below it, nested, a run for each attempt.

A refused attempt has its recipe, its scores and why it was made. Of an accepted one the Release's own run is the nested one. Nothing here decides anything, and no model
or picture is in it; everything is tagged with the subject's id, so that `forget` finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from likeness import digest
from likeness.dossier import flatten
from likeness.ladder import Attempt, best
from likeness.records import BaseRef, Release, Subject
from likeness.registry import Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"      # what MLflow's pages nest by
KEY = "likeness.attempts"          # of the run for all of them, and, with another value, of each
LONGEST = 5000                     # characters of a tag that any server takes


@dataclass(frozen=True)
class Attempts:
    """Everything tried on one training set, and what each attempt trained.

    Attributes:
        training_set: its digest.
        tried: in order.
        adapters: of each, the digest of its Adapter.
        release: of the accepted one, if there is one.
    """

    subject: Subject
    base: BaseRef
    training_set: str
    tried: Sequence[Attempt]
    adapters: Sequence[str]
    release: Release | None = None

    @property
    def key(self) -> str:
        """Digest of subject and training set: attempts of another night on the same photos stand below the same run."""
        return digest.of_json({"subject": self.subject.id, "training_set": self.training_set})

    @property
    def digest(self) -> str:
        """Of everything that MLflow is to show."""
        return digest.of_json([self.key, [self.of(n) for n in range(len(self.tried))], None if self.release is None else self.release.plain()])

    def of(self, number: int) -> str:
        """Key of one attempt: the same weights under another verdict are another one."""
        return digest.of_json([self.key, self.adapters[number], self.tried[number].verdict.digest])


def show_attempts(registry: Registry, attempts: Attempts, *, check: Callable[[], None] = lambda: None) -> str:
    """Make MLflow show all attempts, nested. May be called any number of times, also after dying anywhere inside: there is one run of each afterwards.

    Of two at the same time one may lose the run that it writes to, as a copy of the other's, and raise; what the other one shows is whole.

    Args:
        registry: where MLflow is.
        attempts: what to show.
        check: called before each effect; raises SubjectForgotten.

    Returns:
        Id of the run for all of them.

    Raises:
        ServerUnreachable: if MLflow does not answer.
        SubjectForgotten: if `check` says so, before or after an effect; what MLflow holds of them is erased again.
    """
    with registry.writing(attempts.subject.id, "showing the attempts", check):
        writer, counts = _Writer(registry, attempts, check), best(attempts.tried)
        above = writer.run(attempts.key, f"{attempts.subject.id}, all attempts", {"likeness.verdict_kind": attempts.tried[counts].verdict.kind, "likeness.counts": str(counts + 1)})
        for number, attempt in enumerate(attempts.tried):
            if attempt.verdict.kind == "accepted" and attempts.release is not None:
                version = registry.client.get_model_version(attempts.release.model, str(attempts.release.version))
                writer.tag(str(version.run_id), {PARENT: above, **_said(number, attempt)})
            else:
                name = f"{attempts.subject.id} attempt {number + 1} {attempt.recipe.method} {attempt.verdict.kind}"
                writer.run(attempts.of(number), name, {PARENT: above, "likeness.adapter": attempts.adapters[number], "likeness.verdict_kind": attempt.verdict.kind, **_said(number, attempt)},
                           params=flatten(attempt.recipe.whole()), scores=attempt.verdict.scores)
        return str(above)


def _said(number: int, attempt: Attempt) -> dict[str, str]:
    return {"likeness.attempt": str(number + 1), "likeness.why": attempt.why[:LONGEST], "likeness.reasons": "; ".join(r.message for r in attempt.verdict.reasons)[:LONGEST]}


class _Writer:
    """One call of `show_attempts`: finds or makes each run."""

    def __init__(self, registry: Registry, attempts: Attempts, check: Callable[[], None]) -> None:
        self.registry, self.check, self.client = registry, check, registry.client
        self.experiment = registry.experiment(f"likeness/{attempts.base.name}", folder=attempts.base.name, tags={"likeness.base": attempts.base.digest}, check=check)
        self.tags = {"likeness.subject": attempts.subject.id, "likeness.noun": attempts.subject.noun, "likeness.training_set": attempts.training_set, "likeness.base_name": attempts.base.name}

    def run(self, key: str, name: str, tags: Mapping[str, str], *, params: Mapping[str, Any] = MappingProxyType({}), scores: Mapping[str, float | None] = MappingProxyType({})) -> str:
        """Id of the run with this key and these contents, made if there is none; copies that another writer made at the same time are deleted."""
        from mlflow.entities import Metric, Param, RunTag

        found = _runs(self.client, self.experiment, key)
        if not found:
            self.check()
            created = self.client.create_run(self.experiment, tags={**self.tags, KEY: key}, run_name=name)
            self.registry.step("attempt")
            found = _runs(self.client, self.experiment, key) or [created]
        run, at = found[0].info.run_id, found[0].info.start_time       # metrics at the run's own start: written twice, they are stored once
        for copy in found[1:]:
            _delete(self.client, copy.info.run_id)
            self.registry.step("copy deleted")
        self.check()
        self.client.log_batch(run, params=[Param(k, str(v)) for k, v in params.items()], tags=[RunTag(k, v) for k, v in {**tags, "mlflow.runName": name}.items()],
                              metrics=[Metric(f"score.{k}", v, at, 0) for k, v in scores.items() if v is not None])
        self.registry.step("attempt's numbers")
        if found[0].info.status != "FINISHED":
            self.check()
            self.client.set_terminated(run, "FINISHED")
        return str(run)

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run that others made."""
        from mlflow.entities import RunTag

        self.check()
        self.client.log_batch(run, tags=[RunTag(k, v) for k, v in tags.items()])
        self.registry.step("attempt of the release")


def _runs(client: MlflowClient, experiment: str, key: str) -> list[Run]:
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=100)
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def _delete(client: MlflowClient, run: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_run(run)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        log.debug("registry: the other writer deleted the copy first (%s)", error.error_code)
