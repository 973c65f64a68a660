"""The registry: MLflow as a projection of the Store. Nothing is decided here that the Store does not know already.

One registered model per Subject (`likeness.<subject>`), one experiment per base, one run and one logged model per Release, all tagged with
the subject's id so that `forget` finds them. No pickle: initialise a logged model, upload files, finalise, create the version, set the
alias. Search-then-create is not exclusive in MLflow (four threads made four versions of one artefact), so exactly-once is decided around
this module by `once` of stage `register`; `Registry.register` converges: whatever an earlier attempt left half made is found by its tags
and completed, a second copy is deleted, the lowest version wins.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from likeness.dossier import Dossier, describe, flatten, model_name, write_files
from likeness.errors import BadSettings, LikenessError, RecipeError, ServerUnreachable, SubjectForgotten, TransientError, translated
from likeness.records import Release
from likeness.unregistering import erase_from_database, erase_through_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

ALIAS = "champion"
_BATCH = 100                   # params and tags of one log_batch; metrics: 1000
_GLOBAL_URI = threading.Lock()


class Registry:
    """MLflow at one address.

    Half of MLflow finds its database through a process-wide address: this class sets it, so one process projects to one server.
    """

    def __init__(self, tracking_uri: str, artifact_root: Path | str | None = None, *, on_step: Callable[[str], None] | None = None) -> None:
        """Nothing is contacted or imported yet.

        Args:
            tracking_uri: `sqlite:////absolute/path/mlflow.db`, a server's http(s) address, or another database URI.
            artifact_root: folder (Path, created when needed) or URI of new experiments' artifacts; None: the server decides.
            on_step: called with a step's name after each write to MLflow, for progress; what it raises is not caught.

        Raises:
            BadSettings: if the address would lead into the current folder, or a database has no artifact root.
        """
        scheme, _, rest = tracking_uri.partition(":")
        if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql") and not scheme.startswith(("postgresql+", "mysql+")):
            raise BadSettings(f"registry: {scheme!r} is no address of MLflow, needed is sqlite:////absolute/path, postgresql://..., or http(s)://...")
        if scheme == "sqlite" and not rest.startswith("////"):
            raise BadSettings("registry: the SQLite address is relative to the current folder, needed are four slashes: sqlite:////absolute/path")
        if scheme not in ("http", "https") and artifact_root is None:
            raise BadSettings("registry: a database holds no artifacts, an artifact root is needed beside it (a folder or an s3:// address)")
        if isinstance(artifact_root, str) and "://" not in artifact_root and not artifact_root.startswith("mlflow-artifacts:"):
            artifact_root = Path(artifact_root)
        if isinstance(artifact_root, Path) and not artifact_root.is_absolute():
            raise BadSettings("registry: the artifact root is relative to the current folder, an absolute path is needed")
        self.tracking_uri = tracking_uri
        self.artifact_root = artifact_root
        self._on_step = on_step
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client at this address.

        Raises:
            ServerUnreachable: if it does not answer.
        """
        if self._client is None:
            # Defaults of 7 retries of 120 s can stall a GPU job when the server dies. Read by MLflow when it is imported and at each request.
            for name, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
                                "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}.items():
                os.environ.setdefault(name, value)
            for name in ("mlflow.store.db.utils", "alembic", "mlflow.tracking._model_registry.client"):
                logging.getLogger(name).setLevel(logging.WARNING)
            with self.talking("opening the registry"):
                from mlflow import MlflowClient  # 3 seconds, so not at import
                if self.tracking_uri.startswith("sqlite:////"):
                    Path(self.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
        return self._client

    def register(self, dossier: Dossier, *, check: Callable[[], None] = lambda: None) -> Release:
        """Make MLflow show this Release, and move the alias `champion` to the newest one.

        May be called any number of times, also after dying anywhere inside: there is one version per adapter afterwards, with one run and
        one logged model. A Release of the same (subject, training set, recipe) with other weights (a newer code epoch) is marked as superseded.

        Args:
            dossier: what to show; its verdict is `accepted`.
            check: called before each effect; `claim.check` of the `once` around this call.

        Raises:
            IntegrityError: if the dossier contradicts itself.
            RecipeError: if its verdict is not accepted.
            ServerUnreachable: if MLflow does not answer.
            SubjectForgotten: if `check` says so, before or after an effect; what was written here is erased again.
        """
        dossier.check()
        written: list[str] = []
        with self.writing(dossier.subject.id, "registering the release", check, written):
            return _Projection(self, dossier, check, written).converge()

    @contextmanager
    def writing(self, subject: str, doing: str, check: Callable[[], None], written: Sequence[str] = ()) -> Iterator[None]:
        """Around whatever makes MLflow show something of a subject: `talking`, and if they were forgotten meanwhile, what was written is erased again.

        Args:
            subject: id of the Subject.
            doing: for errors: "registering the release".
            check: raises SubjectForgotten; asked once more at the end.
            written: addresses of artifacts, as they are written.
        """
        with self.talking(doing):
            try:
                with _GLOBAL_URI:
                    yield
                check()
            except Exception:
                # Stopped between a check and its effect, woken after the subject was forgotten: MLflow's own errors ("no such run") say that too
                try:
                    check()
                except SubjectForgotten:
                    for uri in written:
                        _delete_artifacts(uri)
                    self.erase(subject)
                    raise
                except LikenessError as e:
                    log.debug("registry: the first error is the one to raise, not %s", e.code)
                raise

    def experiment(self, name: str, *, folder: str, tags: dict[str, str], check: Callable[[], None] = lambda: None) -> str:
        """Id of an experiment, made if there is none, restored if it was deleted. Within `talking`.

        Args:
            name: of the experiment.
            folder: below the artifact root, where its artifacts lie.
            tags: of a new one.
            check: called before each effect.
        """
        known = self.client.get_experiment_by_name(name)
        if known is None:
            root = self.artifact_root
            location = None if root is None else f"{root.as_uri() if isinstance(root, Path) else root.rstrip('/')}/{folder}"
            check()
            with _existing_is_fine():
                self.client.create_experiment(name, artifact_location=location, tags=tags)
                self.step("experiment")
            known = self.client.get_experiment_by_name(name)
            assert known is not None
        if known.lifecycle_stage != "active":
            check()
            self.client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)

    def erase(self, subject: str, *, database: str | None = None) -> None:
        """Delete everything MLflow holds of a subject, artifact bytes included. May be called any number of times.

        With a database nothing is left; a server only marks rows as deleted (docs/erasure.md).

        Args:
            subject: id of the Subject.
            database: SQLAlchemy's address of the server's own database, if we may open it.

        Raises:
            ServerUnreachable: if MLflow does not answer.
        """
        with self.talking("erasing a subject"):
            if self.remote:
                import mlflow

                mlflow.set_tracking_uri(self.tracking_uri)     # artifacts that only the server can reach are deleted through it
                erase_through_server(self.client, subject, delete_artifacts=_delete_artifacts, step=self.step)
            if database is not None or not self.remote:
                erase_from_database(database or self.tracking_uri, subject, delete_artifacts=_delete_artifacts, step=self.step)

    def sweep_scratch(self, names: Collection[str]) -> None:
        """Delete what a killed registration left on its way, by the names given to `scratch`."""
        for folder in self._scratch_root.glob("*"):
            if folder.name.partition("-")[0] in names:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def remote(self) -> bool:
        """Whether MLflow is reached through a server, whose database is not ours to open."""
        return self.tracking_uri.startswith("http")

    @property
    def _scratch_root(self) -> Path:
        return self.artifact_root / ".scratch" if isinstance(self.artifact_root, Path) else Path(tempfile.gettempdir()) / "likeness-registry"

    def find(self, subject: str, adapter: str) -> Release | None:
        """The Release of this adapter digest, if it is registered."""
        with self.talking("looking up a release"):
            versions = _versions(self.client, f"name = '{model_name(subject)}' and tags.`likeness.adapter` = '{adapter}'")
        return _release(versions[0]) if versions else None

    def champion(self, subject: str) -> Release | None:
        """The Release that carries the alias `champion`, if any."""
        from mlflow.exceptions import MlflowException
        with self.talking("looking up the champion"):
            try:
                return _release(self.client.get_model_version_by_alias(model_name(subject), ALIAS))
            except MlflowException as e:
                if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                    return None         # no such model, or no such alias: each server says it in its own way
                raise

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A private folder for files on their way; left-overs of a killed process under the same name go too."""
        root = self._scratch_root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root) as folder:
            yield Path(folder)
        for left in root.glob(f"{name}-*"):
            shutil.rmtree(left, ignore_errors=True)     # another process may be removing it too

    def step(self, name: str) -> None:
        """Say that a write to MLflow was made."""
        log.debug("registry: %s", name)
        if self._on_step is not None:
            self._on_step(name)

    @contextmanager
    def talking(self, doing: str) -> Iterator[None]:
        """Map what MLflow, SQLAlchemy and requests raise to our errors; their messages may hold addresses with passwords."""
        try:
            with translated(doing):
                yield
        except LikenessError:
            raise
        except Exception as e:
            kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(e).__mro__}
            cure = "check that the registry of likeness.toml answers, then run the same command again: nothing is registered twice"
            if "sqlalchemy.SQLAlchemyError" in kinds or "requests.RequestException" in kinds:
                raise ServerUnreachable(f"the registry does not answer while {doing} ({type(e).__name__}): {cure}") from e
            if "mlflow.MlflowException" not in kinds:
                raise
            code = str(getattr(e, "error_code", "INTERNAL_ERROR"))
            if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
                raise BadSettings(f"the registry refuses us while {doing} ({code}): check MLFLOW_TRACKING_USERNAME and its rights") from e
            if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "ENDPOINT_NOT_FOUND"):
                raise RecipeError(f"the registry does not take this while {doing} ({code}): is it an MLflow 3 server? {str(e)[:200]}") from e
            if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"):
                raise ServerUnreachable(f"the registry does not answer while {doing} ({code}): {cure}") from e
            raise TransientError(f"the registry changed while {doing} ({code}): {cure}") from e


class _Projection:
    """One call of `register`: find or make each thing, in an order in which a version exists only once all it points to is complete."""

    def __init__(self, registry: Registry, dossier: Dossier, check: Callable[[], None], written: list[str]) -> None:
        self.registry, self.dossier, self.check = registry, dossier, check
        self.client = registry.client
        self.tags = describe(dossier)
        self.written = written                     # addresses of artifacts, as they are written
        self.mine = f"tags.`likeness.register_key` = '{dossier.register_key}' and tags.`likeness.adapter` = '{dossier.adapter.digest}'"

    def converge(self) -> Release:
        import mlflow
        # create_model_version(source="models:/<id>") looks the model up through the process-wide address when it talks to a database
        mlflow.set_tracking_uri(self.registry.tracking_uri)
        experiment = self.find_experiment()
        versions = self.find_versions()
        if not versions or versions[0].tags.get("likeness.content") != self.tags["likeness.content"]:
            run = self.find_run(experiment, preferred=versions[0].run_id if versions else None)
            self.write_run(run)
            model = self.find_model(experiment, run, preferred=versions[0].tags.get("likeness.model_id") if versions else None)
            self.create_version(run, model)
            versions = self.find_versions()
        winner = versions[0]
        self.drop_copies(experiment, winner, versions[1:])
        self.settle(winner)
        return _release(winner)

    def find_experiment(self) -> str:
        base = self.dossier.base
        return self.registry.experiment(f"likeness/{base.name}", folder=base.name, tags={"likeness.base": base.digest}, check=self.check)

    def find_versions(self) -> list[ModelVersion]:
        return _versions(self.client, f"name = '{self.dossier.model}' and tags.`likeness.adapter` = '{self.dossier.adapter.digest}'")

    def find_runs(self, experiment: str) -> list[Run]:
        found = self.client.search_runs([experiment], self.mine, max_results=1000, order_by=["attributes.start_time ASC"])
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def find_run(self, experiment: str, *, preferred: str | None) -> Run:
        """The oldest run of this Release, made if there is none: an earlier attempt's run is completed, not copied."""
        runs = self.find_runs(experiment)
        if not runs:
            self.check()
            name = f"{self.dossier.subject.id} {self.dossier.recipe.method} {self.dossier.recipe.digest[:8]}"
            created = self.client.create_run(experiment, tags=dict(list(self.tags.items())[:_BATCH]), run_name=name)
            self.registry.step("run")
            runs = self.find_runs(experiment) or [created]
        return next((run for run in runs if run.info.run_id == preferred), runs[0])

    def write_run(self, run: Run) -> None:
        from mlflow.entities import Metric, Param, RunTag
        run_id, at = run.info.run_id, run.info.start_time      # metrics at the run's own start: written twice, they are stored once
        params = [Param(k, str(v)) for k, v in flatten(self.dossier.recipe.whole()).items()]
        params += [Param("subject", self.dossier.subject.id), Param("noun", self.dossier.subject.noun)]
        adapter = self.dossier.adapter
        metrics = [Metric("loss", value, at, step) for step, value in adapter.losses]
        metrics += [Metric(f"choice.{name}", value, at, point.step) for point in (adapter.curve.points if adapter.curve else ())
                    for name, value in (("identity", point.identity), ("obedience", point.obedience)) if value is not None]
        metrics += [Metric(f"score.{k}", v, at, 0) for k, v in self.dossier.verdict.scores.items() if v is not None]
        metrics += [Metric(f"seconds.{k}", v, at, 0) for k, v in self.dossier.seconds.items()]
        tags = [RunTag(k, v) for k, v in self.tags.items()]
        for i in range(0, max(len(params), len(tags)), _BATCH):
            self.check()
            self.client.log_batch(run_id, params=params[i:i + _BATCH], tags=tags[i:i + _BATCH])
            self.registry.step("params and tags")
        for i in range(0, len(metrics), 1000):
            self.check()
            self.client.log_batch(run_id, metrics=metrics[i:i + 1000])
            self.registry.step("metrics")
        self.check()
        self.client.log_inputs(run_id, datasets=_datasets(self.dossier))
        self.registry.step("inputs")
        with self.registry.scratch(self.dossier.register_key) as folder:
            write_files(folder, self.dossier, weights=False)
            self.check()
            self.written.append(str(run.info.artifact_uri))
            self.client.log_artifacts(run_id, str(folder))
            self.registry.step("run artifacts")

    def find_models(self, experiment: str) -> list[LoggedModel]:
        found = self.client.search_logged_models([experiment], self.mine)
        return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))

    def find_model(self, experiment: str, run: Run, *, preferred: str | None) -> LoggedModel:
        """The logged model of this Release with all its files, made or completed."""
        from mlflow.entities import LoggedModelOutput
        models = self.find_models(experiment)
        if not models:
            self.check()
            created = self.client.create_logged_model(experiment, name=f"{self.dossier.subject.id}-{self.dossier.adapter.digest[:12]}",
                                                      source_run_id=run.info.run_id, tags=self.tags, model_type="adapter")
            self.registry.step("model")
            models = self.find_models(experiment) or [created]
        model = next((m for m in models if m.model_id == preferred), models[0])
        self.check()
        self.client.set_logged_model_tags(model.model_id, self.tags)
        with self.registry.scratch(self.dossier.register_key) as folder:
            write_files(folder, self.dossier, weights=True)
            self.check()
            self.written.append(model.artifact_location)
            self.client.log_model_artifacts(model.model_id, str(folder))
            self.registry.step("model artifacts")
        outputs = self.client.get_run(run.info.run_id).outputs
        if model.model_id not in [o.model_id for o in (outputs.model_outputs if outputs else [])]:
            self.check()
            self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=self.dossier.adapter.steps)])
            self.registry.step("outputs")
        if str(model.status) != "READY":
            self.check()
            self.client.finalize_logged_model(model.model_id, "READY")
            self.registry.step("model ready")
        return model

    def create_version(self, run: Run, model: LoggedModel) -> None:
        name, tags = self.dossier.model, {**self.tags, "likeness.model_id": model.model_id}
        found = self.find_versions()
        if found:                     # the same weights under a newer verdict: the version stays, what it says is brought up to date
            self.check()
            for key, value in tags.items():
                if found[0].tags.get(key) != value:
                    self.client.set_model_version_tag(name, found[0].version, key, value)
            self.registry.step("version tags")
            return
        self.check()
        with _existing_is_fine():
            self.client.create_registered_model(name, tags={"likeness.subject": self.dossier.subject.id})
            self.registry.step("registered model")
        self.check()
        self.client.create_model_version(name, source=f"models:/{model.model_id}", run_id=run.info.run_id, model_id=model.model_id, tags=tags,
                                         description=f"{self.dossier.recipe.method} on {self.dossier.base.name}, {len(self.dossier.photos)} photos")
        self.registry.step("version")

    def drop_copies(self, experiment: str, winner: ModelVersion, copies: Sequence[ModelVersion]) -> None:
        """Delete what two writers at once left twice. The lowest version wins wherever this runs, so it needs no claim."""
        for copy in copies:
            log.warning("%s: version %s is a copy of version %s and is deleted", winner.name, copy.version, winner.version)
            self.client.delete_model_version(copy.name, copy.version)
            self.registry.step("copy deleted")
        for model in self.find_models(experiment):
            if model.model_id != winner.tags.get("likeness.model_id"):
                _delete_artifacts(model.artifact_location)
                self.client.delete_logged_model(model.model_id)
                self.registry.step("copy deleted")
        for run in self.find_runs(experiment):
            if run.info.run_id != winner.run_id:
                _delete_artifacts(run.info.artifact_uri)
                self.client.delete_run(run.info.run_id)
                self.registry.step("copy deleted")

    def settle(self, winner: ModelVersion) -> None:
        """Finish the run, mark what this Release supersedes, move the alias: each only if it is not so already."""
        run_id = str(winner.run_id)
        if self.client.get_run(run_id).info.status != "FINISHED":
            self.check()
            self.client.set_terminated(run_id, "FINISHED")
            self.registry.step("run finished")
        versions = _versions(self.client, f"name = '{winner.name}'")
        for version in versions:
            same = version.tags.get("likeness.register_key") == self.dossier.register_key
            if same and int(version.version) < int(winner.version) and "likeness.superseded_by" not in version.tags:
                self.check()
                self.client.set_model_version_tag(winner.name, version.version, "likeness.superseded_by", str(winner.version))
                self.registry.step("superseded")
        newest = versions[-1]                       # never back to an older one because that one was registered again
        if int(self.client.get_registered_model(winner.name).aliases.get(ALIAS, 0)) != int(newest.version):
            self.check()
            self.client.set_registered_model_alias(winner.name, ALIAS, newest.version)
            self.registry.step("alias")


def _versions(client: MlflowClient, query: str) -> list[ModelVersion]:
    """All versions found, lowest first."""
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(query, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda v: int(v.version))


def _release(version: ModelVersion) -> Release:
    return Release(subject=version.tags["likeness.subject"], model=version.name, version=int(version.version),
                   adapter=version.tags["likeness.adapter"], verdict=version.tags["likeness.verdict"])


def _datasets(dossier: Dossier) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    contents = [(f"photo {p.sha256[:12]}", p.sha256, "photo") for p in dossier.photos]
    contents.append(("training set", dossier.training_set.digest, "training_set"))
    # MLflow keeps 36 characters of a digest, so the whole one is a tag of the input
    return [DatasetInput(Dataset(name=name, digest=sha256[:36], source_type="likeness", source=f'{{"sha256":"{sha256}"}}'),
                         tags=[InputTag("mlflow.data.context", "training"), InputTag("sha256", sha256), InputTag("kind", kind)])
            for name, sha256, kind in contents]


def _delete_artifacts(uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    repository = get_artifact_repository(uri)
    if repository.list_artifacts():
        repository.delete_artifacts()  # type: ignore[no-untyped-call]


@contextmanager
def _existing_is_fine() -> Iterator[None]:
    """Somebody else made the same thing between our look and our write."""
    from mlflow.exceptions import MlflowException
    try:
        yield
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
