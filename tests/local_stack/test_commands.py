import json
import re
import stat
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.base_models import BaseModelEntry
from core.settings import Settings
from local_stack.commands import Stack
from local_stack.errors import StackError
from local_stack.leftovers import role_of
from local_stack.ports import free_local_port

MakeSettings = Callable[..., Settings]


@pytest.fixture
def stack(make_settings: MakeSettings) -> Stack:
    settings = make_settings(
        inference_urls=["http://127.0.0.1:4321"], port=4322, training_slots=3, inference_threads=1, inference_max_batch=7, device="cpu", dtype="bfloat16"
    )
    settings.data_dir.mkdir(parents=True)
    return Stack(settings)


def test_a_later_start_would_find_every_process(stack: Stack) -> None:
    """Whatever is started here must be recognised by leftovers.py."""
    specs = (stack.valkey_process(), stack.inference_process(), stack.api_process(), stack.worker_process())
    assert [role_of(spec.argv, stack.settings.data_dir) for spec in specs] == [spec.name for spec in specs]
    assert [spec.log_path for spec in specs] == [stack.settings.data_dir / "logs" / f"{spec.name}.log" for spec in specs]
    once = (stack.python("migrations"), stack.python("core.bootstrap"), stack.preparation(stack.served_model))
    assert [role_of(argv, stack.settings.data_dir) for argv in once] == ["preparation"] * 3


def test_the_processes_are_told_the_settings(stack: Stack) -> None:
    def words(argv: list[str], *options: str) -> list[str]:
        return [argv[argv.index(option) + 1] for option in options]

    assert words(stack.inference_process().argv, "--port", "--threads", "--max-batch") == ["4321", "1", "7"]
    assert words(stack.inference_process().argv, "--device", "--dtype") == ["cpu", "bfloat16"]
    assert words(stack.inference_process().argv, "--base-model", "--adapters-dir") == ["smollm2-135m-instruct", str(stack.settings.served_adapters_dir)]
    assert words(stack.api_process().argv, "--host", "--port") == ["127.0.0.1", "4322"]
    assert words(stack.worker_process().argv, "--pool", "--loglevel") == ["threads", stack.settings.log_level]
    assert "--concurrency" not in stack.worker_process().argv, "the worker takes its threads from the settings itself"


def test_the_embedded_server_has_a_directory_for_what_it_is_sent(stack: Stack) -> None:
    argv = Stack(stack.settings.model_copy(update={"inference_adapters": "upload"})).inference_process().argv
    assert argv[argv.index("--uploads-dir") + 1] == str(stack.settings.data_dir / "uploaded_adapters")
    assert "--adapters-dir" not in argv


def test_children_get_absolute_settings_and_threads_that_do_not_spin(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment = stack.environment
    assert environment["SDFT_DATA_DIR"] == str(stack.settings.data_dir)
    assert environment["SDFT_CACHE_DIR"] == str(stack.settings.cache_dir)
    assert environment["SDFT_INFERENCE_URLS"] == "http://127.0.0.1:4321"
    assert environment["SDFT_PORT"] == "4322"
    assert environment["OMP_WAIT_POLICY"] == "passive"


def test_an_inference_server_answers_where_it_takes_the_key(make_settings: MakeSettings) -> None:
    class NeedsKey(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            open_to_all = self.path == "/health"
            self.send_response(200 if open_to_all or self.headers.get("authorization") == "Bearer right" else 401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), NeedsKey) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        answers = {}
        for key in ("right", "wrong", None):
            settings = make_settings(inference_urls=[f"http://127.0.0.1:{server.server_port}"], inference_api_key=key)
            answers[key] = Stack(settings).inference_answers()
        server.shutdown()
        thread.join()
    assert answers == {"right": True, "wrong": False, None: False}


def test_modules_of_the_current_directory_are_never_run(stack: Stack) -> None:
    """A user's folder named api/ or inference/ must not stand in for ours."""
    assert all("-P" in spec.argv for spec in (stack.inference_process(), stack.api_process(), stack.worker_process()))


def test_a_revision_is_passed_on(make_settings: MakeSettings) -> None:
    entry = BaseModelEntry(id="big", source="hub:org/big", revision="abc123")
    argv = Stack(make_settings(base_models=[entry])).preparation(entry)
    assert re.search(r"--id big --source hub:org/big --revision abc123 --directory \S+/base_models/big-", " ".join(argv))


def test_a_deep_data_directory_gets_a_short_private_socket(make_settings: MakeSettings, tmp_path: Path) -> None:
    stack = Stack(make_settings(data_dir=tmp_path / ("d" * 100)))
    spec = stack.valkey_process()
    try:
        assert stack.environment["SDFT_REDIS_URL"] == f"redis+socket://{stack.valkey_socket}"
        assert stat.S_IMODE(stack.valkey_socket.parent.stat().st_mode) == 0o700
        assert role_of(spec.argv, stack.settings.data_dir) == "valkey"
    finally:
        stack.valkey_socket.parent.rmdir()


def test_a_broker_of_the_users_is_left_as_it_is(make_settings: MakeSettings) -> None:
    stack = Stack(make_settings(redis_url="redis://broker:6379/0"))
    assert "SDFT_REDIS_URL" not in stack.resolved_settings


def test_every_data_directory_has_a_worker_name_of_its_own(make_settings: MakeSettings, tmp_path: Path) -> None:
    names = {Stack(make_settings(data_dir=tmp_path / name)).worker_name for name in ("a", "b")}
    assert len(names) == 2


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", '["127.0.0.1"]'), ("::1", '["[::1]"]'), ("0.0.0.0", None), ("192.0.2.1", None)])
def test_on_a_loopback_address_only_its_names_are_answered(make_settings: MakeSettings, host: str, expected: str | None) -> None:
    assert Stack(make_settings(host=host)).resolved_settings.get("SDFT_ALLOWED_HOSTS") == expected


def test_hosts_that_the_user_allows_are_left_as_they_are(make_settings: MakeSettings) -> None:
    assert "SDFT_ALLOWED_HOSTS" not in Stack(make_settings(allowed_hosts=["*"])).resolved_settings


def vllm_environment(directory: Path, *, plugin: bool = True) -> Path:
    """What looks like one; returns its Python."""
    python = directory / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    if plugin:
        (directory / "vllm" / "lib" / "python3.11" / "site-packages" / "sdft_vllm_plugin-0.1.0.dist-info").mkdir(parents=True)
    return python


@pytest.fixture
def vllm_stack(make_settings: MakeSettings, tmp_path: Path) -> Stack:
    settings = make_settings(
        inference="vllm", inference_urls=["http://127.0.0.1:4321"], vllm_python=vllm_environment(tmp_path), device="cpu", inference_api_key="secret"
    )
    settings.data_dir.mkdir(parents=True)
    return Stack(settings)


def test_vllm_serves_the_prepared_model_with_adapters(vllm_stack: Stack) -> None:
    spec = vllm_stack.inference_process()
    assert Path(spec.argv[0]) == vllm_stack.settings.vllm_python
    words = " ".join(spec.argv)
    assert f"--model {vllm_stack.served_model.directory(vllm_stack.settings.cache_dir)} --served-model-name smollm2-135m-instruct" in words
    assert "--host 127.0.0.1 --port 4321 --dtype float32 --enable-lora --max-lora-rank 32 --max-loras 4 --max-cpu-loras 32" in words
    assert spec.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert (spec.environment["VLLM_API_KEY"], "secret" in words) == ("secret", False)
    assert vllm_stack.api_process().environment["SDFT_INFERENCE"] == "vllm", "jobs may ask for its rollouts"
    assert spec.environment["VLLM_PLUGINS"] == "sdft_cpu_lora", "and no resolver answers with adapters that nobody proved"


def test_vllm_has_a_directory_for_what_it_is_sent(vllm_stack: Stack) -> None:
    assert "ADAPTER_UPLOADS_DIR" not in vllm_stack.inference_process().environment
    sent = Stack(vllm_stack.settings.model_copy(update={"inference_adapters": "upload"}))
    assert sent.inference_process().environment["ADAPTER_UPLOADS_DIR"] == str(vllm_stack.settings.data_dir / "uploaded_adapters")


def test_vllm_and_its_children_are_found_again(vllm_stack: Stack) -> None:
    spec = vllm_stack.inference_process()
    data_dir = vllm_stack.settings.data_dir
    assert role_of(spec.argv, data_dir) == "inference"
    assert role_of([f"{spec.environment['VLLM_PROCESS_NAME_PREFIX']}::EngineCore"], data_dir) == "inference"
    assert role_of([f"data_dir={data_dir}2::EngineCore"], data_dir) is None


@pytest.mark.parametrize(("dtype", "device", "expected"), [("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("bfloat16", "cpu", "bfloat16")])
def test_trainers_compute_in_vllm_s_precision(make_settings: MakeSettings, tmp_path: Path, dtype: str, device: str, expected: str) -> None:
    stack = Stack(make_settings(inference="vllm", dtype=dtype, device=device, vllm_python=vllm_environment(tmp_path)))
    argv = stack.inference_process().argv
    assert stack.environment["SDFT_DTYPE"] == argv[argv.index("--dtype") + 1] == expected
    assert ("--gpu-memory-utilization" in argv) == (device == "cuda")


def test_vllm_that_is_not_installed_is_named_with_the_remedy(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"make vllm.*SDFT_VLLM_PYTHON"):
        Stack(make_settings(inference="vllm", vllm_python=tmp_path / "none")).inference_process()


def test_vllm_without_the_plugin_is_not_started(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Its kernels for the CPU would answer for the base model with some adapter's weights, and its doors stand open."""
    python = vllm_environment(tmp_path, plugin=False)
    for device in ("cpu", "cuda"):
        with pytest.raises(StackError, match=r"mixes adapters up.*make vllm"):
            Stack(make_settings(inference="vllm", vllm_python=python, device=device)).inference_process()


def test_vllm_is_told_none_of_the_service_s_secrets_but_its_key(vllm_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DATABASE_URL", "postgresql://user:password@db/sdft")
    spec = vllm_stack.inference_process()
    assert [name for name in spec.environment if name.startswith("SDFT_")] == []
    assert "sdft_vllm_key.RequireKey" in spec.argv


@pytest.mark.parametrize("which", ["stack", "vllm_stack"])
def test_the_keys_of_the_storage_are_for_api_and_worker_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    keys = {"SDFT_S3_SECRET_ACCESS_KEY": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "OPENAI_API_KEY": "canary", "SDFT_DATABASE_URL": "canary"}
    stack: Stack = request.getfixturevalue(which)
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    for process in (stack.api_process(), stack.worker_process()):
        assert keys.items() <= process.environment.items()
    for process in (stack.inference_process(), stack.valkey_process()):
        assert "canary" not in process.environment.values()


def test_vllm_adapts_the_layers_that_adapters_change_and_no_other(make_settings: MakeSettings, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = make_settings(
        inference="vllm", vllm_python=vllm_environment(tmp_path), device="cpu", base_models=[{"id": "tiny", "source": str(tiny_model_dir)}]
    )
    prepared = settings.base_models[0].directory(settings.cache_dir)
    prepared.parent.mkdir(parents=True)
    prepared.symlink_to(tiny_model_dir)
    argv = Stack(settings).inference_process().argv
    start = argv.index("--lora-target-modules") + 1
    assert argv[start : start + 7] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert not {"lm_head", "embed_tokens"} & set(argv)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, {"degraded": []}, []),
        (200, {"degraded": ["workers"]}, ["workers"]),
        (503, {"degraded": ["database"]}, None),
        (200, {"another": "program"}, None),
    ],
)
def test_the_api_is_ready_when_it_can_answer_requests(make_settings: MakeSettings, status: int, body: dict[str, object], expected: list[str] | None) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack = Stack(make_settings(port=server.server_address[1]))
        assert stack.readiness() == expected
        server.shutdown()
    assert Stack(make_settings(port=free_local_port())).readiness() is None
