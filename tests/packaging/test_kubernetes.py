"""deploy/kubernetes: valid by Kubernetes' own schemas, whole, confined, and in agreement with the images and the code."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fastapi.routing import iter_route_contexts
from sqlalchemy import text

from api.app import app
from api.probes import PROBE_SECONDS
from core.base_models import DEFAULT_BASE_MODELS
from core.database import Database
from core.settings import Settings
from core.tables.jobs import JOB_STATUSES
from tests.packaging.containers import ROOT, read_dockerfile
from tests.rows import add_job, add_project
from worker import await_base_models

DIRECTORY = ROOT / "deploy" / "kubernetes"
KEDA = DIRECTORY / "components" / "keda"
STAGES = read_dockerfile()
SETTINGS = {f"SDFT_{name.upper()}" for name in Settings.model_fields}
KUBERNETES_VERSIONS = ("1.31", "1.36")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


KUSTOMIZATION = documents(DIRECTORY / "kustomization.yaml")[0]
OBJECTS = [document for name in KUSTOMIZATION["resources"] for document in documents(DIRECTORY / name)]
WORKLOADS = {document["metadata"]["name"]: document for document in OBJECTS if document["kind"] in ("Deployment", "Job")}
LONG_RUNNING = [name for name, document in WORKLOADS.items() if document["kind"] == "Deployment"]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for document in OBJECTS if (document["kind"], document["metadata"]["name"]) == (kind, name)]
    return found


def pod_of(name: str) -> dict[str, Any]:
    pod: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return pod


def container_of(name: str) -> dict[str, Any]:
    (container,) = pod_of(name)["containers"]
    return dict(container)


def secret() -> dict[str, str]:
    return dict(line.split("=", 1) for line in (DIRECTORY / "secret.example.env").read_text().splitlines())


def environment_of(name: str) -> dict[str, str]:
    """What a process of the workload sees, the image's variables included."""
    container = container_of(name)
    referenced = {next(iter(source)): next(iter(source.values()))["name"] for source in container.get("envFrom", [])}
    assert set(referenced.values()) <= {"sdft"}
    shared = (named("ConfigMap", "sdft")["data"] if "configMapRef" in referenced else {}) | (secret() if "secretRef" in referenced else {})
    return STAGES[target_of(name)].environment | shared | {entry["name"]: entry["value"] for entry in container.get("env", [])}


def target_of(name: str) -> str:
    return str(container_of(name)["image"]).removeprefix("sdft-")


def command_of(name: str) -> list[str]:
    return container_of(name).get("command") or STAGES[target_of(name)].command


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("document", OBJECTS, ids=lambda document: f"{document['kind']}-{document['metadata']['name']}")
def test_kubernetes_knows_every_field(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_every_file_is_part_of_it() -> None:
    assert {path.name for path in DIRECTORY.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}
    assert set(WORKLOADS) == {"sdft-migrate", "sdft-prepare-base-model", "sdft-api", "sdft-worker", "sdft-worker-cpu"}
    assert not any("namespace" in document["metadata"] for document in OBJECTS)
    assert not any(document["kind"] == "Secret" for document in OBJECTS), "secrets are the operator's"


def test_every_image_is_built_and_can_be_renamed() -> None:
    used = {container_of(name)["image"] for name in WORKLOADS}
    assert {target_of(name) for name in WORKLOADS} <= set(STAGES)
    assert {image["name"] for image in KUSTOMIZATION["images"]} == used


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_confined(name: str) -> None:
    pod, container = pod_of(name), container_of(name)
    assert pod["automountServiceAccountToken"] is False
    user = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert user is not None
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user[1]),
        "runAsGroup": int(user[1]),
        "fsGroup": int(user[1]),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_is_mounted_is_there_and_where_the_process_looks(name: str) -> None:
    volumes = {volume["name"]: volume for volume in pod_of(name)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(name)["volumeMounts"]}
    assert set(mounts) == set(volumes)
    claims = {volume_name: volume["persistentVolumeClaim"]["claimName"] for volume_name, volume in volumes.items() if "persistentVolumeClaim" in volume}
    assert set(claims) <= {"cache"}, "pods share prepared base models and no other disk"
    assert all(named("PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
    environment = environment_of(name)
    assert mounts.get("data", "/data") == environment["SDFT_DATA_DIR"]
    assert mounts.get("cache", "/cache") == environment["SDFT_CACHE_DIR"]
    assert mounts["tmp"] == "/tmp"


@pytest.mark.parametrize("name", ["sdft-worker", "sdft-worker-cpu"])
def test_workers_wait_for_base_models_that_they_can_t_prepare(name: str) -> None:
    container = container_of(name)
    (first,) = pod_of(name)["initContainers"]
    assert first["command"] == ["python", "-m", await_base_models.__name__]
    assert {part: first[part] for part in ("image", "envFrom", "securityContext")} == {
        part: container[part] for part in ("image", "envFrom", "securityContext")
    }
    assert {mount["name"] for mount in first["volumeMounts"]} == {"cache", "tmp"}
    assert all(mount in container["volumeMounts"] for mount in first["volumeMounts"])
    (cache,) = [mount for mount in container["volumeMounts"] if mount["name"] == "cache"]
    assert cache["readOnly"] is True
    assert "memory" in first["resources"]["limits"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_variable_is_a_setting(name: str) -> None:
    ours = {variable for variable in environment_of(name) if variable.startswith("SDFT_")}
    assert ours <= SETTINGS


@pytest.mark.parametrize("name", [*LONG_RUNNING, "sdft-migrate"])
def test_the_environment_makes_valid_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment_of(name).items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.inference == "vllm"
    assert settings.storage_url == "s3://sdft"
    assert settings.inference_adapters == "upload", "inference servers see no pod's data directory"
    assert settings.dtype != "auto", "a trainer would measure for itself, and differ from the inference servers"
    assert settings.inference_api_key is not None
    assert settings.inference_urls == ["http://vllm.inference.svc:8000"]
    Database(settings.resolved_database_url).close()


def test_what_runs_once_is_what_compose_runs() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    migrate = " ".join(command_of("sdft-migrate"))
    assert compose["migrate"]["command"] == ["sh", "-c", f"{migrate} && python -m core.bootstrap"], "the Job keeps no file that a key could be in"
    assert command_of("sdft-prepare-base-model") == compose["prepare-base-model"]["command"]
    for service in ("migrate", "prepare-base-model"):
        assert target_of(f"sdft-{service}") == compose[service]["build"]["target"]
    assert f"--id={DEFAULT_BASE_MODELS[0].id}" in command_of("sdft-prepare-base-model")
    assert environment_of("sdft-prepare-base-model")["HF_HUB_OFFLINE"] == "0"
    assert all(environment_of(name)["HF_HUB_OFFLINE"] == "1" for name in WORKLOADS if name != "sdft-prepare-base-model")


def test_the_prepared_model_lies_where_the_settings_look() -> None:
    (directory,) = [word.partition("=")[2] for word in command_of("sdft-prepare-base-model") if word.startswith("--directory=")]
    assert directory == str(DEFAULT_BASE_MODELS[0].directory(Path("/cache")))


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_deployments_run_the_image_s_own_command_on_its_ports(name: str) -> None:
    container, spec = container_of(name), WORKLOADS[name]["spec"]
    assert "command" not in container
    assert "args" not in container
    assert [port["containerPort"] for port in container["ports"]] == STAGES[target_of(name)].ports
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert pod_of(name)["terminationGracePeriodSeconds"] == 35


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_probes_ask_for_what_there_is(name: str) -> None:
    container = container_of(name)
    ports = {port["name"] for port in container["ports"]}
    routes = {route.path for route in iter_route_contexts(app.routes)} if name == "sdft-api" else {"/metrics"}
    probes = {kind: probe for kind, probe in container.items() if kind.endswith("Probe")}
    assert "livenessProbe" in probes
    for probe in probes.values():
        assert probe["httpGet"]["path"] in routes
        assert probe["httpGet"]["port"] in ports


def test_the_api_s_probes_are_answered_whatever_hosts_are_allowed_and_however_slow_a_broker_is() -> None:
    probes = {kind: probe for kind, probe in container_of("sdft-api").items() if kind.endswith("Probe")}
    assert all(probe["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "localhost"}] for probe in probes.values())
    assert probes["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert probes["readinessProbe"]["timeoutSeconds"] > PROBE_SECONDS
    assert probes["livenessProbe"]["httpGet"]["path"] == "/healthz", "a database that is down is no reason to restart the API"


def test_one_service_and_one_budget_choose_the_api() -> None:
    labels = WORKLOADS["sdft-api"]["spec"]["template"]["metadata"]["labels"]
    assert named("Service", "sdft-api")["spec"]["selector"] == named("PodDisruptionBudget", "sdft-api")["spec"]["selector"]["matchLabels"] == labels
    assert named("Service", "sdft-api")["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container_of("sdft-api")["ports"]}
    assert WORKLOADS["sdft-api"]["spec"]["replicas"] > named("PodDisruptionBudget", "sdft-api")["spec"]["minAvailable"]


def chosen_by(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    selector = policy["spec"]["podSelector"]
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(labels.get(each["key"]) in each["values"] for each in expressions)


@pytest.mark.parametrize("name", WORKLOADS)
def test_networks_are_closed_but_for_what_is_needed(name: str) -> None:
    policies = [document for document in OBJECTS if document["kind"] == "NetworkPolicy"]
    labels = WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]
    chosen = [policy["spec"] for policy in policies if chosen_by(policy, labels)]
    assert any(set(spec["policyTypes"]) == {"Ingress", "Egress"} for spec in chosen), "else all that is not named stays open"
    entered = {port["port"] for spec in chosen for rule in spec.get("ingress", []) for port in rule["ports"]}
    assert entered == {port["containerPort"] for port in container_of(name).get("ports", [])}
    reached = [
        (block["ipBlock"]["cidr"], port["port"])
        for spec in chosen
        for rule in spec.get("egress", [])
        for block in rule["to"]
        if "ipBlock" in block
        for port in rule["ports"]
    ]
    public = {port for cidr, port in reached if cidr == "0.0.0.0/0"}
    assert public == ({443} if name == "sdft-prepare-base-model" else set())
    urls = [
        secret()["SDFT_DATABASE_URL"],
        secret()["SDFT_REDIS_URL"],
        *(named("ConfigMap", "sdft")["data"][name] for name in ("SDFT_INFERENCE_URLS", "SDFT_S3_ENDPOINT_URL")),
    ]
    needed = {int(found) for url in urls for found in re.findall(r":(\d+)(?:/|$)", url)}
    assert needed | {443} == {port for _, port in reached}


def test_only_the_worker_that_trains_takes_a_gpu() -> None:
    gpus = {name: container_of(name)["resources"]["limits"].get("nvidia.com/gpu") for name in WORKLOADS}
    assert {name for name, number in gpus.items() if number} == {"sdft-worker"}
    assert environment_of("sdft-worker-cpu")["SDFT_TRAINING_SLOTS"] == "0"
    assert environment_of("sdft-worker-cpu")["SDFT_DEVICE"] == "cpu", "else it would take the GPUs that it sees"


def test_keda_scales_the_worker_by_the_jobs_that_need_one(postgres_url: str) -> None:
    assert documents(KEDA / "kustomization.yaml")[0]["resources"] == ["workers.yaml"]
    assert f"#   - {KEDA.relative_to(DIRECTORY)}" in (DIRECTORY / "kustomization.yaml").read_text()
    (scaled,) = documents(KEDA / "workers.yaml")
    (trigger,) = scaled["spec"]["triggers"]
    assert (scaled["apiVersion"], scaled["kind"], trigger["type"]) == ("keda.sh/v1alpha1", "ScaledObject", "postgresql")
    assert scaled["spec"]["scaleTargetRef"]["name"] == "sdft-worker"
    assert trigger["metadata"]["connectionFromEnv"] in secret()
    assert trigger["metadata"]["targetQueryValue"] == str(container_of("sdft-worker")["resources"]["limits"]["nvidia.com/gpu"])
    database = Database(postgres_url)
    try:
        project_id = add_project(database)
        for status in JOB_STATUSES:
            add_job(database, project_id, status)
        with database.reading() as session:
            assert session.scalar(text(trigger["metadata"]["query"])) == 2
    finally:
        database.close()
