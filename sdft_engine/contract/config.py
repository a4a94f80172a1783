"""The resolved configuration of one training run, as it stands in `config.json`. Torch-free."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.hyperparameters import ResolvedSdft, ResolvedSupervised
from sdft_engine.contract.teacher_prompts import TeacherView, check_teacher_template


def _usable_template(template: str) -> str:
    try:
        check_teacher_template(template)
    except ConfigurationError as error:
        raise ValueError(error.message) from error
    return template


class VllmSampler(BaseModel):
    """A vLLM server that samples the rollouts: serves the base model under `base_model`'s id, with LoRA at run time."""

    model_config = ConfigDict(extra="forbid")

    url: str
    adapters_dir: Path
    """Which server and trainer both see under this path; with `upload` the trainer's own."""
    upload: bool = False
    """Send the server the student's files over HTTP."""
    name_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$")]
    """Of the names that the student is loaded under: no other run's."""
    api_key_env: str | None = None
    """The environment variable that holds the server's key."""
    tolerance: float = Field(0.05, gt=0)
    """Largest difference in log-probability (nats) between server and trainer on a fixed text."""


class TrainingConfig(BaseModel):
    """Everything a trainer needs to know besides the data. Nothing in it is "auto" but dtype, device, temperature and
    the masking of cut-off answers, which depend on the machine and the model and are settled, and reported, by the trainer."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    method: Literal["sdft", "supervised"]
    base_model: str
    base_model_dir: Path
    seed: int = 0
    sdft: ResolvedSdft | None = None
    supervised: ResolvedSupervised | None = None
    teacher_template: Annotated[str, AfterValidator(_usable_template)] = "example"
    reasoning: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    gradient_checkpointing: bool = False
    """Keep each layer's input only, and compute the rest again for the gradient."""
    tokens_per_pass: int = Field(2048, ge=1)
    """Padded tokens of a pass with gradients (at least one row is read); without gradients twice as many. The gradients of a
    batch's passes are added up."""
    rollout_sample_every_steps: int = Field(10, ge=1)
    sampler: VllmSampler | None = None
    """Who samples the rollouts; none: the trainer itself."""
    importance: Literal["sequence", "prefix"] = "sequence"
    """How rollouts of a sampler that is not the trainer are weighed (sdft_engine.importance)."""
    retention: Literal["off", "end", "checkpoints"] = "off"
    """When the general questions are asked: never, after the last step, or at every checkpoint too."""

    @property
    def teacher_view(self) -> TeacherView:
        return TeacherView(self.teacher_template, self.reasoning)

    @property
    def hyperparameters(self) -> ResolvedSupervised:
        """What both methods have."""
        if self.method == "sdft":
            return self.distillation
        if self.supervised is None:
            raise ConfigurationError("config.json has no section for the method 'supervised'")
        return self.supervised

    @property
    def distillation(self) -> ResolvedSdft:
        """What SDFT has."""
        if self.sdft is None:
            raise ConfigurationError("config.json has no section for the method 'sdft'")
        return self.sdft


def read_config(path: Path) -> TrainingConfig:
    """Raises ConfigurationError naming every field that is wrong."""
    try:
        return TrainingConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist") from error
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {told(error)}") from error


def told(error: ValidationError) -> str:
    """Every wrong field with what is wrong about it, in one line."""
    return "; ".join(": ".join([*filter(None, [".".join(map(str, each["loc"]))]), each["msg"]]) for each in error.errors())
