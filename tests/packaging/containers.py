"""Dockerfile and docker-compose.yml as data, read the way docker reads the parts that we use."""

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    """One FROM of the Dockerfile with everything it inherits."""

    user: str = "root"
    environment: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_command: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    stop_signal: str = ""


def read_dockerfile() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage = Stage()
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            known = stages.get(parent, Stage())
            stage = stages[name] = Stage(
                known.user, dict(known.environment), list(known.ports), list(known.command), list(known.health_command), list(known.packages), known.stop_signal
            )
        elif instruction == "ENV":
            stage.environment |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif instruction == "USER":
            stage.user = rest
        elif instruction == "STOPSIGNAL":
            stage.stop_signal = rest
        elif instruction == "EXPOSE":
            stage.ports.append(int(rest))
        elif instruction == "CMD":
            stage.command = json.loads(rest)
        elif instruction == "HEALTHCHECK":
            stage.health_command = json.loads(rest.partition("CMD ")[2])
        elif instruction == "RUN" and "pip install" in rest:
            stage.packages.append(rest)
    return stages


def read_compose() -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return compose


def our_services() -> dict[str, dict[str, Any]]:
    """The services that are built from this repository."""
    return {name: service for name, service in read_compose()["services"].items() if "build" in service}


def command_of(service: dict[str, Any]) -> list[str]:
    """As words: the service's own command, or its image's."""
    command = service.get("command") or read_dockerfile()[service["build"]["target"]].command
    return list(command)


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """What a process of the service sees, the image's variables included, with no .env but what it has to have, each `secret`."""

    def filled_in(value: object) -> str:
        with_defaults = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", str(value))
        return re.sub(r"\$\{[A-Z_]+:\?[^}]*\}", "secret", with_defaults)

    own = {name: filled_in(value) for name, value in service.get("environment", {}).items()}
    return {**read_dockerfile()[service["build"]["target"]].environment, **own}


def python_modules_of(words: list[str]) -> list[str]:
    """Every module that a command starts: `python -m X`, the application of uvicorn and of celery, also inside `sh -c`."""
    if words[:2] == ["sh", "-c"]:
        return [module for part in words[2].split("&&") for module in python_modules_of(shlex.split(part))]
    modules = [words[words.index("-m") + 1]] if "-m" in words else []
    modules += [words[words.index("-A") + 1]] if "-A" in words else []
    modules += [word.partition(":")[0] for word in words if re.fullmatch(r"[a-z_.]+:app", word)]
    return modules


def process_environment(overrides: dict[str, str]) -> dict[str, str]:
    """The environment of a test's child process, without the developer's own settings."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("SDFT_")}, **overrides}
