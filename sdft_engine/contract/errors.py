"""Errors that cross the run directory: typed in the trainer, rendered by the service.

    EngineError                 code            who must act
    ├── DatasetError            invalid_dataset     the user: the data
    ├── ContextExceeded         context_length_exceeded  the user: the data
    ├── ConfigurationError      invalid_configuration  the user or the operator
    ├── BaseModelError          base_model_unusable    the operator
    ├── CheckpointDamaged       checkpoint_damaged     nobody: the worker fetches an older checkpoint
    ├── NumericalError          numerical_error        the user: learning rate, precision
    ├── Collapsed               collapsed           the user: the teacher, the learning rate
    ├── OutOfMemory             out_of_memory          the user: batch size, completion length
    ├── SamplerUnavailable      sampler_unavailable    the operator: the inference server that samples rollouts
    ├── StaleSampler            stale_sampler          the operator: that server, or its precision
    └── DiskFull                disk_full              the operator

Torch-free.
"""

from typing import Any


class EngineError(Exception):
    """Base of all errors a trainer reports. `code` and `param` reach the job's `error` object unchanged."""

    code = "engine_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param}


class DatasetError(EngineError):
    code = "invalid_dataset"


class ContextExceeded(EngineError):
    code = "context_length_exceeded"


class ConfigurationError(EngineError):
    code = "invalid_configuration"


class BaseModelError(EngineError):
    code = "base_model_unusable"


class CheckpointDamaged(EngineError):
    code = "checkpoint_damaged"


class NumericalError(EngineError):
    code = "numerical_error"


class Collapsed(EngineError):
    """The student degenerates; checkpoints from before are kept."""

    code = "collapsed"


class SamplerUnavailable(EngineError):
    """The server that samples rollouts can't be reached, or refuses. `lasting`: it would refuse again."""

    code = "sampler_unavailable"

    def __init__(self, message: str, *, param: str | None = None, lasting: bool = False) -> None:
        super().__init__(message, param=param)
        self.lasting = lasting


class StaleSampler(EngineError):
    """The server that samples rollouts does not hold the weights that are trained."""

    code = "stale_sampler"


class OutOfMemory(EngineError):
    code = "out_of_memory"


class DiskFull(EngineError):
    code = "disk_full"
