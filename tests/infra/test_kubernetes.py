"""infra/kubernetes is what Kubernetes' own schemas take, and fits the code: pools, settings, images, roles and their secrets, one GPU for each run."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values, find_placeholders

from flows.automations import HEARTBEAT_S
from flows.deploying import plan_of
from likeness.settings import Settings, load_settings
from tests.infra.test_infra import PREFECT_OPTIONS, programs

OLDEST = "1.29"                 # of Kubernetes
ROLES = ("control", "cpu", "gpu")
PARTS = (".", "jobs")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "infra" / "kubernetes"


def customization(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())          # type: ignore[no-any-return]


def documents(folder: Path) -> list[dict[str, Any]]:
    """Everything that `kubectl apply -k` reads there, without what it generates."""
    return [document for name in customization(folder)["resources"] for document in yaml.safe_load_all((folder / name).read_text())]


@pytest.fixture(scope="module")
def objects(folder: Path) -> list[dict[str, Any]]:
    return [document for part in PARTS for document in documents(folder / part)]


def named(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def job_of(folder: Path, role: str) -> dict[str, Any]:
    """The Job that Prefect's worker makes of a template, for a batch."""
    template = json.loads((folder / "jobs" / f"{role}.json").read_text())
    values = {name: about["default"] for name, about in template["variables"]["properties"].items() if "default" in about}
    values |= {"name": "training-3", "command": ["prefect", "flow-run", "execute"], "env": [{"name": "PREFECT__FLOW_RUN_ID", "value": "1"}], "labels": {"prefect.io/flow-run-name": "training-3"}}
    return copy.deepcopy(apply_values(template["job_configuration"], values)["job_manifest"])           # type: ignore[no-any-return]


def pods(folder: Path, objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod template) of all that makes pods."""
    for o in objects:
        if o["kind"] in ("Deployment", "Job"):
            yield o["metadata"]["name"], o["spec"]["template"]
        elif o["kind"] == "CronJob":
            yield o["metadata"]["name"], o["spec"]["jobTemplate"]["spec"]["template"]
    for role in ("cpu", "gpu"):
        yield f"jobs/{role}.json", job_of(folder, role)["spec"]["template"]


def env_file(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line)           # type: ignore[arg-type,return-value]


@pytest.fixture
def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As a pod reads them."""
    for key, value in env_file(folder / "likeness.env").items():
        monkeypatch.setenv(key, str(folder / "likeness.toml") if key == "LIKENESS_CONFIG" else value)
    return load_settings()


@pytest.mark.parametrize("version", [OLDEST, ".".join(kubernetes_validate.latest_version().split(".")[:2])])
def test_kubernetes_takes_every_object(folder: Path, objects: list[dict[str, Any]], version: str) -> None:
    example = list(yaml.safe_load_all((folder / "secrets.example.yaml").read_text()))
    for o in (*objects, *example):
        kubernetes_validate.validate(o, version, strict=True)
    for role in ("cpu", "gpu"):
        job = job_of(folder, role)
        for name in ("parallelism", "completions"):             # Prefect's worker insists on them in the pod, where Kubernetes has no such fields and drops them
            assert job["spec"]["template"]["spec"].pop(name) == 1
        kubernetes_validate.validate(job, version, strict=True)


def test_a_wrong_field_would_be_noticed(objects: list[dict[str, Any]]) -> None:
    wrong = copy.deepcopy(named(objects, "Deployment")["worker-gpu"])
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_every_file_is_applied_but_the_example(folder: Path) -> None:
    for part in PARTS:
        written = {path.name for path in (folder / part).glob("*.yaml")} - {"kustomization.yaml", "secrets.example.yaml"}
        assert set(customization(folder / part)["resources"]) == written
    files = [file for made in customization(folder)["configMapGenerator"] for file in made.get("files", made.get("envs"))]
    assert [name for name in files if not (folder / name).is_file()] == []
    assert customization(folder)["namespace"] == customization(folder / "jobs")["namespace"] == named(documents(folder), "Namespace").popitem()[0]


def test_what_a_pod_names_is_there(folder: Path, objects: list[dict[str, Any]]) -> None:
    made = customization(folder)["configMapGenerator"]
    assert customization(folder)["generatorOptions"] == {"disableNameSuffixHash": True}         # jobs/ names them by these names
    maps = {m["name"] for m in made}
    secrets = set(named(list(yaml.safe_load_all((folder / "secrets.example.yaml").read_text())), "Secret"))
    claims, accounts = set(named(objects, "PersistentVolumeClaim")), set(named(objects, "ServiceAccount"))
    asked_secrets = set()
    for name, template in pods(folder, objects):
        pod = template["spec"]
        assert pod["serviceAccountName"] in accounts, name
        volumes = {v["name"]: v for v in pod["volumes"]}
        for volume in volumes.values():
            assert volume.get("configMap", {"name": "likeness-env"})["name"] in maps, name
            assert volume.get("persistentVolumeClaim", {"claimName": "likeness-home"})["claimName"] in claims, name
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), name
        for container in pod["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} == set(volumes), name
            for source in container.get("envFrom", ()):
                if "secretRef" in source:
                    asked_secrets.add(source["secretRef"]["name"])
                else:
                    assert source["configMapRef"]["name"] in maps, name
    assert asked_secrets == secrets


def test_each_role_has_credentials_of_its_own_and_none_is_written_down(folder: Path, objects: list[dict[str, Any]]) -> None:
    secrets = named(list(yaml.safe_load_all((folder / "secrets.example.yaml").read_text())), "Secret")
    assert {name: set(s["stringData"].values()) for name, s in secrets.items()} == {name: {""} for name in secrets}
    assert "secrets.example.yaml" not in customization(folder)["resources"]
    boto3 = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    for role in ROLES:
        assert set(secrets[f"likeness-store-{role}"]["stringData"]) == boto3
    assert set(secrets["likeness-postgres"]["stringData"]) == {"PGPASSWORD"}
    for name, template in pods(folder, objects):
        account = template["spec"]["serviceAccountName"].removeprefix("likeness-")
        given = {s["secretRef"]["name"] for c in template["spec"]["containers"] for s in c.get("envFrom", ()) if "secretRef" in s}
        allowed = {"servers": {"likeness-postgres", "likeness-mlflow"}, "jobs": set()}.get(account, {f"likeness-store-{account}"})
        assert given <= allowed, name
    for path in (*folder.rglob("*.yaml"), *folder.rglob("*.env"), *folder.rglob("*.json"), folder / "likeness.toml"):
        text = path.read_text()
        assert not re.search(r"://[^/@\s]*:[^/@\s]*@", text), f"{path.name} holds a password"
        assert not re.search(r"(?i)(password|secret_access_key|access_key_id)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]", text), path.name
    mlflow = json.loads((folder.parent / "bucket" / "mlflow.json").read_text())
    assert all("ARTIFACTS" in s["Resource"] for s in mlflow["Statement"])        # never the store's bucket


def test_nobody_is_root_or_may_become_it(folder: Path, objects: list[dict[str, Any]]) -> None:
    [namespace] = named(objects, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    dockerfile = (folder.parent / "Dockerfile").read_text()
    assert "useradd --uid 10001 --gid 10001" in dockerfile
    for name, template in pods(folder, objects):
        pod = template["spec"]
        secure = pod["securityContext"]
        assert (secure["runAsNonRoot"], secure["runAsUser"], secure["runAsGroup"], secure["fsGroup"]) == (True, 10001, 10001, 10001), name
        assert secure["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] == (pod["serviceAccountName"] == "likeness-jobs"), name
        assert pod["enableServiceLinks"] is False, name          # MLFLOW_PORT=tcp://... would be read as an option
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name


def test_the_settings_of_a_pod_are_settings(folder: Path, objects: list[dict[str, Any]], settings: Settings) -> None:
    assert (settings.store.kind, settings.deploy.trains_on) == ("s3", "gpu")
    assert settings.registry.tracking_uri is not None
    assert settings.registry.tracking_uri.get_secret_value() == f"http://mlflow:{port(objects, 'mlflow')}"
    env = env_file(folder / "likeness.env")
    assert env["PREFECT_API_URL"] == f"http://prefect:{port(objects, 'prefect')}/api"
    assert env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)
    assert env["PREFECT_LOGGING_LEVEL"] == "WARNING"             # at INFO the names of runs, which hold subjects, go into logs
    toml = tomllib.loads((folder / "likeness.toml").read_text())
    assert toml["base_folder"] == str(settings.base_folder)
    for name, template in pods(folder, objects):
        [container] = template["spec"]["containers"]
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        if any(s.get("configMapRef") == {"name": "likeness-env"} for s in container["envFrom"]) and "jobs" not in template["spec"]["serviceAccountName"]:
            assert {str(settings.home), str(Path(env["LIKENESS_CONFIG"]).parent)} <= mounts.keys(), name
        if name.startswith(("worker-", "jobs/")):
            assert mounts[str(settings.base_folder)]["readOnly"] is True, name
    [base] = [c for n, c in named(objects, "PersistentVolumeClaim").items() if n == "likeness-base"]
    assert base["spec"]["accessModes"] == ["ReadOnlyMany"]


def port(objects: list[dict[str, Any]], name: str) -> int:
    [given] = named(objects, "Service")[name]["spec"]["ports"]
    [container] = named(objects, "Deployment")[name]["spec"]["template"]["spec"]["containers"]
    assert (container["ports"], given["targetPort"]) == ([{"name": "http", "containerPort": given["port"]}], "http")
    assert container["args"][container["args"].index("--port") + 1] == str(given["port"])
    return int(given["port"])


def test_workers_serve_the_pools_that_deploy_makes_one_run_for_each_gpu(folder: Path, objects: list[dict[str, Any]], settings: Settings) -> None:
    slots = {p.name: p.slots for p in plan_of(settings).pools}
    served = {}
    for name, o in named(objects, "Deployment").items():
        [container] = o["spec"]["template"]["spec"]["containers"]
        words = container["args"]
        if "--pool" not in words:
            continue
        kind = words[words.index("--type") + 1]
        served[name] = (pool := words[words.index("--pool") + 1])
        assert (name, kind) in ((f"worker-{pool}", "process"), (f"jobs-{pool}", "kubernetes"))
        assert "--with-healthcheck" in words
        assert container["livenessProbe"]["httpGet"] == container["startupProbe"]["httpGet"] == {"path": "/health", "port": "health"}
        assert o["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == (name == "worker-gpu")
        if gpus:
            assert words[words.index("--limit") + 1] == "1"      # two runs on one GPU while another one idles: the pool's limit alone does not say where
            assert o["spec"]["replicas"] == slots[pool]
            assert container["image"] == "likeness-cuda"
    assert served == {f"worker-{p}": p for p in slots} | {f"jobs-{p}": p for p in ("cpu", "gpu")}


def test_templates_are_what_prefects_worker_reads(folder: Path, settings: Settings) -> None:
    """Its own template, as the Prefect server that is installed here ships it, says which keys it reads."""
    import prefect.server.api.collections_data as shipped

    views = json.loads((Path(next(iter(shipped.__path__))) / "views" / "aggregate-worker-metadata.json").read_text())
    its_own = views["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    assert settings.base_folder is not None
    for role, image in (("cpu", "likeness-cpu"), ("gpu", "likeness-cuda")):
        template = json.loads((folder / "jobs" / f"{role}.json").read_text())
        assert template["job_configuration"].keys() <= its_own["job_configuration"].keys()
        variables = set(template["variables"]["properties"])
        assert {p.name for p in find_placeholders(template["job_configuration"])} == variables <= set(its_own["variables"]["properties"])
        job = job_of(folder, role)
        theirs = its_own["job_configuration"]["job_manifest"]
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert (job["apiVersion"], job["kind"], job["spec"]["template"]["spec"]["restartPolicy"]) == ("batch/v1", "Job", "Never")
        assert container["name"] == theirs["spec"]["template"]["spec"]["containers"][0]["name"]
        assert job["spec"]["backoffLimit"] == 0                  # the server starts a crashed run again, with its own count
        tags = {i["name"]: f"{i['newName']}:{i['newTag']}" for i in customization(folder)["images"]}
        assert container["image"] == tags[image]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if role == "gpu" else None)
        standing = yaml.safe_load((folder / f"{role}.yaml").read_text())["spec"]["template"]["spec"]["containers"][0]
        assert container["envFrom"] == standing["envFrom"]
        assert container["volumeMounts"] == standing["volumeMounts"]
        assert container["resources"] == standing["resources"]


def test_only_pods_of_likeness_reach_the_servers(folder: Path, objects: list[dict[str, Any]]) -> None:
    [policy] = named(objects, "NetworkPolicy").values()
    [[peer]] = [rule["from"] for rule in policy["spec"]["ingress"]]
    for name, template in pods(folder, objects):
        assert peer["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), name
    for name in ("prefect", "mlflow"):
        selector = named(objects, "Service")[name]["spec"]["selector"]
        assert selector == named(objects, "Deployment")[name]["spec"]["template"]["metadata"]["labels"]
        assert named(objects, "Service")[name]["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_every_command_exists(folder: Path, objects: list[dict[str, Any]]) -> None:
    known = programs()
    for name, template in pods(folder, objects):
        [container] = template["spec"]["containers"]
        program, command, *words = container["args"]
        if program == "prefect":
            assert (command, words[0]) in (("server", "start"), ("worker", "start"), ("flow-run", "execute")), name
            assert {w for w in words if w.startswith("--")} <= PREFECT_OPTIONS, name
            continue
        options = {option for parameter in known[program][command].params for option in parameter.opts}
        assert {w for w in words if w.startswith("--")} <= options, name
    servers = env_file(folder / "servers.env")
    read = {e for parameter in known["mlflow"]["server"].params for e in ([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ())}
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"} <= servers.keys() & read


def test_prune_runs_where_the_home_is(objects: list[dict[str, Any]]) -> None:
    [prune] = named(objects, "CronJob").values()
    pod = prune["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    control = named(objects, "Deployment")["worker-control"]["spec"]["template"]
    [near] = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near["labelSelector"]["matchLabels"].items() <= control["metadata"]["labels"].items()
    assert [v for v in pod["volumes"] if v["name"] == "home"] == [v for v in control["spec"]["volumes"] if v["name"] == "home"]
    assert prune["spec"]["concurrencyPolicy"] == "Forbid"
