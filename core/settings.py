"""Every setting of the service, read from `SDFT_*` environment variables. `.env.example` lists them all."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.base_models import DEFAULT_BASE_MODELS, BaseModelEntry

VLLM_RANKS = (8, 16, 32, 64, 128, 256)
HOST_PATTERN = re.compile(r"\*|(\*\.)?[\w.-]+|\[[0-9a-fA-F:.]+\]")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SDFT_", extra="ignore", frozen=True, hide_input_in_errors=True)

    data_dir: Path = Field(Path("sdft-data"), description="Where this server keeps its database, files and runs.")
    cache_dir: Path = Field(Path("~/.cache/sdft"), description="Converted base models; shared by all data directories.")
    database_url: str | None = Field(None, description="SQLAlchemy URL. Default: SQLite in the data directory.")
    database_connections: int = Field(
        40, ge=4, description="Most connections of one process to the database; all processes together share Postgres's max_connections."
    )
    storage_url: str | None = Field(
        None, description="Where files, adapters and checkpoints are kept: s3://bucket or s3://bucket/prefix. Default: the data directory."
    )
    s3_endpoint_url: str | None = Field(None, description="URL of a store that speaks S3. Default: AWS.")
    s3_region: str | None = Field(None, description="Region of the bucket. Default: AWS_REGION, else us-east-1.")
    s3_access_key_id: str | None = Field(None, description="Key of the bucket. Default: the AWS_* variables or the machine's role.")
    s3_secret_access_key: SecretStr | None = Field(None, description="Its secret.")
    redis_url: str | None = Field(None, description="Broker URL. Default: the embedded Valkey's socket in the data directory.")
    inference: Literal["embedded", "vllm"] = Field(
        "embedded", description="Inference server that `sdft up` starts where SDFT_INFERENCE_URLS names none, or that runs there."
    )
    inference_urls: Annotated[list[str], NoDecode] = Field(
        ["http://127.0.0.1:8809"],
        min_length=1,
        description="Inference servers (inference/ or vLLM) of one base model, on private addresses, separated by commas; each answers for every adapter.",
    )
    inference_adapters: Literal["shared", "upload"] = Field(
        "shared",
        description="How adapters reach the inference servers: in a directory that they share with API and workers, under the same path, or over HTTP.",
    )
    inference_api_key: SecretStr | None = Field(None, description="Bearer key that the inference server expects, if any.")
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=1, le=65_535, description="Port that the API listens on.")
    allowed_hosts: list[str] = Field(
        ["*"], description='Names in the Host header that the API answers beside 127.0.0.1, localhost and [::1], as a JSON list; "*" for all.'
    )
    base_models: list[BaseModelEntry] = Field(
        default_factory=lambda: list(DEFAULT_BASE_MODELS), description="The catalogue of base models, as a JSON list of {id, source, revision?}."
    )
    default_method: Literal["sdft", "supervised"] = Field("sdft", description="Method of a job that names none.")

    max_file_bytes: int = Field(512 * 1024**2, ge=1, description="Largest uploaded file, also after decompression.")
    max_line_bytes: int = Field(1024**2, ge=1, description="Longest line of a training file.")
    max_lines: int = Field(1_000_000, ge=1, description="Most lines of a training file.")
    max_request_bytes: int = Field(4 * 1024**2, ge=1, description="Largest JSON request body.")
    rate_limit_requests_per_minute: int = Field(6000, ge=0, description="Requests that one API key may send a minute to each API process; 0: any number.")
    key_max_event_streams: int = Field(100, ge=0, description="Event streams that one API key may have open on each API process; 0: any number.")
    key_max_answers: int = Field(128, ge=0, description="Answers (prompts times n) that one API key may have in work through each API process; 0: any number.")
    project_max_file_bytes: int = Field(0, ge=0, description="Bytes that one project's files may have together; 0: any number.")
    project_max_unfinished_jobs: int = Field(10_000, ge=0, description="Jobs of one project that have not ended; 0: any number.")
    min_free_bytes: int = Field(512 * 1024**2, ge=0, description="Free space on the disk of storage that uploads leave to the database, checkpoints and logs.")
    min_training_examples: int = Field(10, ge=1, description="Fewest lines of a training file.")

    lease_seconds: float = Field(60, gt=0, description="How long a worker's claim on a job holds without a heartbeat.")
    heartbeat_seconds: float = Field(15, gt=0, description="How often a worker renews its claim.")
    poll_seconds: float = Field(2, gt=0, description="How often workers look for expired leases and forgotten jobs.")
    max_lost_leases: int = Field(3, ge=1, description="Lost leases or crashes, without a new checkpoint between them, after which a job fails.")
    training_slots: int = Field(
        1, ge=0, description="Jobs that a worker without GPUs trains at a time; 0: it trains none, and does the rest of a worker's work."
    )
    devices: Annotated[list[str] | None, NoDecode] = Field(
        None, description="GPUs that a worker owns, as CUDA_VISIBLE_DEVICES names them, separated by commas. Default: all that it sees."
    )
    devices_per_job: int = Field(1, ge=1, description="GPUs that a job trains on; with more than one its trainer runs under torchrun.")
    project_max_running_jobs: int | None = Field(None, ge=1, description="Jobs of one project that run at a time, unless the project has a limit of its own.")

    collect_every_seconds: float = Field(3600, ge=0, description="How often a worker removes what is needed no more; 0: never.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest training states of an unfinished job, and checkpoint models of a finished one, that are kept.")
    keep_exports_seconds: float = Field(7 * 86_400, gt=0, description="How long a model's merged or GGUF form is kept after it was made.")
    keep_runs_seconds: float = Field(14 * 86_400, gt=0, description="How long after a job's end its logs, rollouts and surplus checkpoint models are kept.")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device of trainer and inference server.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Precision of the base model's weights in both; auto measures.")
    retention_probes: Literal["off", "end", "checkpoints"] = Field(
        "end", description="When a job's model is asked general questions to measure what it kept: never, after the last step, at every checkpoint too."
    )
    gradient_checkpointing: bool = Field(
        False, description="Trainers keep each layer's input only and compute the rest again for the gradient: less memory, a third more work."
    )
    tokens_per_pass: int = Field(2048, ge=1, description="Tokens that a trainer's pass with gradients holds; a batch takes as many passes as it needs.")
    trainer_threads: int | None = Field(None, ge=1, description="CPU threads of a trainer. Default: all cores.")
    inference_threads: int | None = Field(None, ge=1, description="CPU threads of the inference server. Default: all cores.")
    inference_max_batch: int = Field(16, ge=1, description="Sequences that the inference server decodes together.")
    inference_max_adapters: int = Field(64, ge=1, description="Adapters that the embedded inference server holds; others are loaded when asked for.")
    vllm_python: Path | None = Field(None, description="Python that has vLLM. Default: .venv-vllm/bin/python beside the service's environment (`make vllm`).")
    vllm_max_loras: int = Field(4, ge=1, description="Adapters that vLLM applies at a time.")
    vllm_max_cpu_loras: int = Field(32, ge=1, description="Adapters that vLLM keeps in memory; others are read from disk again when they are asked for.")
    vllm_max_lora_rank: int = Field(32, description="Largest rank of an adapter that vLLM serves: 8, 16, 32, 64, 128 or 256.")
    vllm_memory_share: float = Field(0.45, gt=0, lt=1, description="Share of a GPU's memory that vLLM takes; the rest is the trainer's.")
    vllm_kv_cache_gib: int = Field(2, ge=1, description="Memory of vLLM's key-value cache on a CPU, in GiB.")
    vllm_arguments: list[str] = Field(default_factory=list, description="More of vLLM's command line arguments, as a JSON list.")
    attestation_tolerance: float = Field(
        0.05, gt=0, description="Largest difference in log-probability (nats) between trainer and inference server for a model to become servable."
    )

    webhook_allow_insecure: bool = Field(
        False, description="Webhooks may go to http:// URLs and to addresses that are not public: for tests and private networks."
    )

    worker_metrics_port: int | None = Field(
        None, ge=1, le=65_535, description="Port on which a worker gives its own measurements to Prometheus. Default: none."
    )
    worker_metrics_host: str = Field("127.0.0.1", description="Address of that port.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line that is written.")
    log_format: Literal["json", "console"] = Field("json", description="Shape of log lines.")

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator("vllm_max_lora_rank")
    @classmethod
    def _rank_of_vllm(cls, value: int) -> int:
        if value not in VLLM_RANKS:
            raise ValueError(f"vLLM knows the ranks {', '.join(map(str, VLLM_RANKS))}, not {value}")
        return value

    @field_validator("vllm_python")
    @classmethod
    def _absolute_unresolved(cls, value: Path | None) -> Path | None:
        """An environment's python is a link, and what it links to does not know the environment."""
        return value and value.expanduser().absolute()

    @field_validator("inference_urls", "devices", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return [url.strip() for url in value.split(",") if url.strip()] if isinstance(value, str) else value

    @field_validator("inference_urls")
    @classmethod
    def _usable_urls(cls, value: list[str]) -> list[str]:
        for url in value:
            if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
                raise ValueError(f"{url!r} is not a URL like http://10.0.0.5:8000")
        if len(set(value)) != len(value):
            raise ValueError("a URL stands there twice")
        return [url.rstrip("/") for url in value]

    @field_validator("devices")
    @classmethod
    def _usable_devices(cls, value: list[str] | None) -> list[str] | None:
        """`cpu` may stand there several times, for as many processes."""
        if value == []:
            raise ValueError("it names no device; leave it out to use all, or set SDFT_DEVICE=cpu and SDFT_TRAINING_SLOTS=0 to train nothing")
        names = [name for name in value or [] if name != "cpu"]
        if len(set(names)) != len(names) or (names and len(names) != len(value or [])):
            raise ValueError("a device stands there twice, or GPUs beside cpu")
        return value

    @field_validator("storage_url")
    @classmethod
    def _bucket(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w-][\w.-]*)*/?", value):
            raise ValueError(f"{value!r} is not s3://bucket or s3://bucket/prefix")
        return value

    @field_validator("s3_endpoint_url")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/?#@]+/?", value):
            raise ValueError(f"{value!r} is not a URL like https://minio.example.com:9000")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            if not HOST_PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is not a name like models.example.com, *.example.com, 192.0.2.1 or [2001:db8::1], without a port, nor *")
        return value

    @field_validator("base_models")
    @classmethod
    def _unique_ids(cls, value: list[BaseModelEntry]) -> list[BaseModelEntry]:
        if len({entry.id for entry in value}) != len(value):
            raise ValueError("two base models have the same id")
        return value

    @model_validator(mode="after")
    def _heartbeat_within_lease(self) -> "Settings":
        if self.heartbeat_seconds >= self.lease_seconds:
            raise ValueError("heartbeat_seconds must be less than lease_seconds, or every lease is lost")
        return self

    @model_validator(mode="after")
    def _s3_settings_together(self) -> "Settings":
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key belong together")
        if self.storage_url is None and (self.s3_endpoint_url or self.s3_access_key_id):
            raise ValueError("storage_url is missing: s3_endpoint_url and s3_access_key_id are of no use without it")
        return self

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'database.sqlite3'}"

    @property
    def resolved_redis_url(self) -> str:
        return self.redis_url or f"redis+socket://{self.valkey_socket}"

    @property
    def valkey_socket(self) -> Path:
        return self.data_dir / "valkey" / "valkey.sock"

    @property
    def storage_dir(self) -> Path:
        return self.data_dir / "storage"

    @property
    def runs_dir(self) -> Path:
        return self.data_dir / "runs"

    @property
    def served_adapters_dir(self) -> Path:
        """Unpacked adapters that the inference server loads, or is sent; a cache of what storage holds."""
        return self.data_dir / "served_adapters"

    @property
    def uploaded_adapters_dir(self) -> Path:
        """Where an inference server of this machine keeps what it is sent."""
        return self.data_dir / "uploaded_adapters"

    @property
    def exports_dir(self) -> Path:
        """Where a worker writes other forms of models before they are stored."""
        return self.data_dir / "exports"

    @property
    def admin_key_path(self) -> Path:
        return self.data_dir / "admin.key"

    def base_model(self, base_model_id: str) -> BaseModelEntry | None:
        return next((entry for entry in self.base_models if entry.id == base_model_id), None)


@lru_cache
def get_settings() -> Settings:
    return Settings()
