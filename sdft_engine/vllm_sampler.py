"""Rollouts by a vLLM server, which decodes many sequences at a time, from the student's weights of this very step.

Every step the student's adapter is written where the server reads adapters, or sent to it, and loaded under a name that no adapter had before:
a name whose weights change in place would keep prefix-cache blocks of the old ones (vLLM issues 42125 and 48352). Before anything
is sampled, the server's log-probabilities of a fixed text must agree with the trainer's; a server that samples from other weights
than these, which would silently make the run off-policy, fails the run.

Prompts are sent as token ids, so that the trainer's chat template is the only one. The noise of a rollout is vLLM's own, seeded by
(seed, step, row).
"""

import base64
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx2
import torch

from sdft_engine.contract.config import VllmSampler
from sdft_engine.contract.errors import SamplerUnavailable, StaleSampler
from sdft_engine.contract.run_directory import sync_directory
from sdft_engine.contract.sealed_directory import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from sdft_engine.generation import score
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel
from sdft_engine.ranks import Ranks
from sdft_engine.rollouts import Rollout
from sdft_engine.seeds import seed_of

PROBE_TOKENS = 64
MOST_REQUESTS = 64
"""At a time; the server batches what arrives together."""
CONNECT_SECONDS = 5
ANSWER_SECONDS = 1800
LOAD_SECONDS = 120
PATIENCE_SECONDS = 300
RETRY_SECONDS = 3
PASSING = (404, 408, 429)
"""Statuses of a server that forgot its adapters when it was restarted, or is busy."""
LOAD_PATH = "/v1/load_lora_adapter"
FILES_PATH = "/adapter_files"
"""Of servers that are sent adapters. A 404 of theirs means that they take none."""
FAILED_LOADS = 3
"""In a row, for the same reason and by a server that says it is well: vLLM answers 500 to an adapter that it will never take."""
HEALTH_SECONDS = 5
LARGEST_SEED = 2**63
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said in full: what a request leaves open, vLLM takes from the model's generation_config.json, and the reported log-probabilities,
which are those before any of it, would not show that the rollouts are another policy's."""


class StoppedWaiting(Exception):
    """A stop was asked for while the server was away: nothing of this step has happened yet."""


class RemoteSampler:
    """The server at `config.url`, and the adapter of the last step on it. `probe` is a fixed text of at least two token ids."""

    def __init__(self, config: VllmSampler, base_model: str, probe: Sequence[int], ranks: Ranks) -> None:
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        self._config, self._base_model, self._ranks = config, base_model, ranks
        self._probe = list(probe)[-PROBE_TOKENS:]  # the end, where the answer is: training changes that first
        self._loaded: str | None = None
        self._doubtful = False
        self.stop_wanted: Callable[[], bool] = lambda: False
        """Asked while a server that is away is waited for."""
        self.report: Callable[[str, Literal["info", "warn"]], None] = lambda message, level: None
        """Told when a server that is away begins to be waited for, and when it is there again."""
        self._failed_load, self._failed_loads = "", 0
        self._http = httpx2.Client(
            base_url=config.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=MOST_REQUESTS, max_keepalive_connections=0),
            trust_env=False,
        )

    def sample(
        self,
        model: LanguageModel,
        rows: Sequence[int],
        student_prompts: Sequence[list[int]],
        teacher_prompts: Sequence[list[int]],
        *,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        step: int,
    ) -> list[Rollout]:
        """One completion per row from the student as it is now. A server that is away, because it is restarted say, is waited for.

        Raises StaleSampler, SamplerUnavailable where it stays away or refuses, or StoppedWaiting.
        """
        wanted = {"max_tokens": max_completion_tokens, "temperature": temperature}
        began, waiting = time.monotonic(), False
        while True:
            try:
                name = self.synchronise(model, step)
                rollouts = self.ask(model, name, rows, student_prompts, teacher_prompts, wanted, seed_of(seed, step))
                if waiting:
                    self.report(f"The inference server that samples the rollouts answers again after {time.monotonic() - began:.0f} s", "info")
                return rollouts
            except SamplerUnavailable as error:
                if error.lasting or self._ranks.size > 1 or time.monotonic() > began + PATIENCE_SECONDS:
                    raise
                if not waiting:
                    self.report(f"Waiting for the inference server that samples the rollouts: {error.message}", "warn")
                    waiting = True
                if self.stop_wanted():
                    raise StoppedWaiting from error
                self._doubtful = True  # it may have forgotten its adapters
                time.sleep(RETRY_SECONDS)

    def ask(
        self,
        model: LanguageModel,
        name: str,
        rows: Sequence[int],
        student_prompts: Sequence[list[int]],
        teacher_prompts: Sequence[list[int]],
        wanted: dict[str, Any],
        seed: int,
    ) -> list[Rollout]:
        """One completion per row from the adapter `name`, with `wanted` of the request. Raises SamplerUnavailable."""
        fixed = wanted | PLAIN_SAMPLING | {"model": name, "logprobs": 0}
        fixed |= {"stop_token_ids": sorted(model.chat_format.eos_token_ids), "return_token_ids": True, "skip_special_tokens": False}

        def rollout(row: int) -> Rollout:
            own_seed = seed_of(seed, row) % LARGEST_SEED
            choice = self._choice(fixed | {"prompt": student_prompts[row], "seed": own_seed})
            ids, logps = choice.get("token_ids"), _logps_of(choice)
            if not isinstance(ids, list) or len(ids) != len(logps):
                raise SamplerUnavailable(f"the inference server gave {len(logps)} log-probabilities for {ids!r:.100}", lasting=True)
            return Rollout(row, student_prompts[row], teacher_prompts[row], ids, choice.get("finish_reason") == "stop", logps)

        if not rows:
            return []
        with ThreadPoolExecutor(min(MOST_REQUESTS, len(rows))) as threads:
            return list(threads.map(rollout, rows))

    def close(self) -> None:
        """Unload the last adapter, as far as the server can be reached, and remove its files."""
        if self._loaded is not None and self._ranks.is_first:
            self._forget(self._loaded)
        self._loaded = None
        self._http.close()

    def synchronise(self, model: LanguageModel, step: int) -> str:
        """Have the server load the student of this step, prove that it did, and drop the one of the step before. Returns its name there.

        Raises StaleSampler or SamplerUnavailable.
        """
        name = f"{self._config.name_prefix}-{step}"
        if name == self._loaded and not self._doubtful:  # what the run settles before its first step was sampled from the same weights
            return name
        problem: str | None = None
        if self._ranks.is_first:
            try:
                self._load(model, name)
                self._require_same(model, name, step)
            except (StaleSampler, SamplerUnavailable) as error:
                self._forget(name)
                problem = f"{type(error).__name__}: {error.message}"
                if self._ranks.size == 1:
                    raise
        if problem := self._ranks.agree(problem):
            raise StaleSampler(problem) if problem.startswith(StaleSampler.__name__) else SamplerUnavailable(problem)
        if self._loaded not in (None, name) and self._ranks.is_first:
            self._forget(str(self._loaded))
        self._loaded, self._doubtful = name, False
        return name

    def _load(self, model: LanguageModel, name: str) -> None:
        directory = self._config.adapters_dir / name
        temporary = directory.with_name(f".{name}.tmp")
        self._forget(name)  # of an attempt at this step that was interrupted; almost always there is none
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.adapters.save(STUDENT, temporary, self._base_model)
        temporary.rename(directory)
        sync_directory(directory.parent)
        path = self._send(directory) if self._config.upload else str(directory)
        self._post(LOAD_PATH, {"lora_name": name, "lora_path": path}, LOAD_SECONDS)
        self._failed_load, self._failed_loads = "", 0

    def _send(self, directory: Path) -> str:
        """Give the server the adapter's files. Returns where it keeps them. Raises SamplerUnavailable."""
        path = None
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            content = (directory / name).read_bytes()
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            headers = {"content-digest": f"sha-256=:{digest}:"}
            answer = self._ask("PUT", f"{FILES_PATH}/{directory.name}/{name}", LOAD_SECONDS, content=content, headers=headers)
            path = answer.get("lora_path") if isinstance(answer, dict) else None
        if not isinstance(path, str):
            raise SamplerUnavailable("the inference server does not say where it keeps the adapter that it was sent", lasting=True)
        return path

    def _require_same(self, model: LanguageModel, name: str, step: int) -> None:
        """Raise StaleSampler unless the server's log-probabilities of the probe are the trainer's."""
        request = {"model": name, "prompt": self._probe, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        served = _logps_of(self._choice(request), slice(1, len(self._probe)))
        own, _ = score(model, self._probe, STUDENT)
        if len(served) != len(own):
            raise SamplerUnavailable(f"the inference server gave {len(served)} log-probabilities of {len(own)} tokens", lasting=True)
        largest = float((torch.tensor(own) - torch.tensor(served)).abs().max())  # a NaN stays one
        if not largest <= self._config.tolerance:
            raise StaleSampler(
                f"at step {step} the inference server's log-probabilities differ from the trainer's by up to {largest:.3g} nats, more than "
                f"{self._config.tolerance:g}: it does not sample from the weights that are trained, or in another precision (SDFT_DTYPE sets both)"
            )

    def _forget(self, name: str) -> None:
        timeout = httpx2.Timeout(LOAD_SECONDS, connect=CONNECT_SECONDS)
        with suppress(httpx2.HTTPError):  # it frees memory only, and a server that is away has forgotten it anyway
            self._http.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=timeout)
            if self._config.upload:
                self._http.delete(f"{FILES_PATH}/{name}", timeout=timeout)
        shutil.rmtree(self._config.adapters_dir / name, ignore_errors=True)

    def _choice(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one choice of a completion. Raises SamplerUnavailable."""
        answer = self._post("/v1/completions", request)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise SamplerUnavailable(f"the inference server answered a completion with {answer!r:.300}", lasting=True)
        choice: dict[str, Any] = choices[0]
        return choice

    def _post(self, path: str, body: dict[str, Any], timeout_seconds: float = ANSWER_SECONDS) -> Any:
        """The answer's JSON, or None where it is none. Raises SamplerUnavailable."""
        return self._ask("POST", path, timeout_seconds, json=body)

    def _ask(self, method: str, path: str, timeout_seconds: float, **content: Any) -> Any:
        try:
            answer = self._http.request(method, path, timeout=httpx2.Timeout(timeout_seconds, connect=CONNECT_SECONDS), **content)
        except httpx2.HTTPError as error:
            raise SamplerUnavailable(f"the inference server that samples the rollouts can't be reached: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            lasting = answer.status_code < 500 and (answer.status_code not in PASSING or (method == "PUT" and answer.status_code == 404))
            if path == LOAD_PATH and answer.status_code == 500:
                lasting = self._fails_for_good(answer.text)
            raise SamplerUnavailable(f"the inference server refused {path} with {answer.status_code}: {answer.text[:300]}", lasting=lasting)
        try:
            return answer.json()
        except ValueError:
            return None

    def _fails_for_good(self, reason: str) -> bool:
        """Whether a load that failed now would fail again. Counts it."""
        self._failed_loads = self._failed_loads + 1 if reason == self._failed_load else 1
        self._failed_load = reason
        if self._failed_loads < FAILED_LOADS:
            return False
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx2.HTTPError:
            return False


def _logps_of(choice: dict[str, Any], part: slice = slice(None)) -> list[float]:
    """Log-probabilities of a choice's tokens. Raises SamplerUnavailable where it has none."""
    try:
        return [float(logp) for logp in choice["logprobs"]["token_logprobs"][part]]
    except (KeyError, TypeError, ValueError) as error:
        raise SamplerUnavailable("the inference server's answer holds no log-probabilities of its tokens", lasting=True) from error
