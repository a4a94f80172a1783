"""LoRA adapters over a frozen base: several by name in one model, chosen per call or per row of a batch.

h = W x + (alpha / r) B A x (Hu et al., arXiv 2106.09685), on every linear layer but the LM head. Factors are float32
whatever the base's precision, so that small updates and the EMA are not lost in rounding. On disk an adapter is PEFT's
format (`adapter_config.json`, `adapter_model.safetensors`), which stock PEFT and vLLM load.

Why not PEFT's layers in memory: training needs two adapters side by side with explicit names, serving needs rows of
different adapters in one batch, and decoding needs the adapter folded into the weights; here each is a few lines.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.sealed_directory import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from sdft_engine.fused_functions import add_correction
from sdft_engine.products import frozen_linear

STUDENT = "student"
"""The name of the adapter that is trained."""
PEFT_PREFIX = "base_model.model."
LARGEST_ALPHA = 1_000_000
UNSUPPORTED_OPTIONS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "layer_replication",
)
"""PEFT's options that change what an adapter computes; ignoring one would serve something else than was trained."""


@dataclass(frozen=True)
class LoraShape:
    rank: int
    alpha: int

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch (as an index tensor) that use one adapter."""

    adapter: str
    rows: Tensor


Active = str | list[RowGroup] | None
"""The adapter of all rows, adapters by rows, or none."""


@dataclass
class Routing:
    """Which adapter the layers apply now, shared by all layers of a model: a name, groups of rows, or none.

    `folded` names the adapter whose product is folded into the layers' second weight, if any.
    """

    active: Active = None
    folded: str | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer with named low-rank corrections: x (..., in) to (..., out)."""

    def __init__(self, base: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.folded_weight: Tensor | None = None

    def add(self, name: str, shape: LoraShape, *, trainable: bool) -> None:
        device = self.base.weight.device
        self.lora_A[name] = nn.Parameter(torch.zeros(shape.rank, self.base.in_features, device=device), requires_grad=trainable)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.base.out_features, shape.rank, device=device), requires_grad=trainable)
        self.scaling[name] = shape.scaling

    def remove(self, name: str) -> None:
        del self.lora_A[name], self.lora_B[name], self.scaling[name]

    def fold(self, name: str) -> None:
        """Put W + scaling B A of this adapter into the second weight."""
        if self.folded_weight is None:
            self.folded_weight = torch.empty_like(self.base.weight)
        self.fold_into(self.folded_weight, name)

    def fold_into(self, weight: Tensor, name: str) -> None:
        """W + scaling B A, (out, in)."""
        torch.addmm(self.base.weight, self.lora_B[name].detach(), self.lora_A[name].detach(), alpha=self.scaling[name], out=weight)

    def correction(self, x: Tensor, name: str) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        return linear(linear(x.to(a.dtype), a), b) * self.scaling[name]

    def add_correction(self, y: Tensor, x: Tensor, active: Active) -> None:
        """Add the adapters' corrections to this layer's output, in place and without gradients."""
        if isinstance(active, str):
            a, b = self.lora_A[active], self.lora_B[active]
            h = frozen_linear(x.reshape(-1, x.shape[-1]).to(a.dtype), a)
            add_correction(y.view(-1, y.shape[-1]), h, b, self.scaling[active])
            return
        for group in active or ():
            y.index_add_(0, group.rows, self.correction(x[group.rows], group.adapter).to(y.dtype))

    def forward(self, x: Tensor) -> Tensor:
        active = self.routing.active
        if active is not None and active == self.routing.folded:
            return frozen_linear(x, self.folded_weight, self.base.bias)  # type: ignore[arg-type]  # fold() has set it
        y = frozen_linear(x, self.base.weight, self.base.bias)
        if active is None:
            return y
        if isinstance(active, str):
            return y + self.correction(x, active).to(y.dtype)
        for group in active:
            y = y.index_add(0, group.rows, self.correction(x[group.rows], group.adapter).to(y.dtype))
        return y


class LoraAdapters:
    """All adapters of one model. Names must be usable as parameter names: no dots, no attribute of torch's ParameterDict."""

    def __init__(self, model: nn.Module, output_embeddings: nn.Module | None) -> None:
        self.routing = Routing()
        self.layers: dict[str, LoraLinear] = {}
        self.shapes: dict[str, LoraShape] = {}
        targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output_embeddings]
        for name in targets:
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            self.layers[name] = LoraLinear(getattr(parent, attribute), self.routing)
            setattr(parent, attribute, self.layers[name])

    def add(self, name: str, shape: LoraShape, *, trainable: bool, generator: torch.Generator | None = None) -> None:
        """A new adapter of zero effect: B = 0 and, with a generator, A from Kaiming's uniform distribution."""
        if name in self.shapes:
            raise ConfigurationError(f"there is an adapter named {name!r} already")
        if "." in name or hasattr(nn.ParameterDict(), name):
            raise ConfigurationError(f"{name!r} can't be an adapter's name")
        self.shapes[name] = shape
        for layer in self.layers.values():
            layer.add(name, shape, trainable=trainable)
            if generator is not None:
                bound = math.sqrt(3 / layer.base.in_features) / math.sqrt(3)
                noise = torch.empty(layer.lora_A[name].shape).uniform_(-bound, bound, generator=generator)
                layer.lora_A[name].data.copy_(noise)

    def remove(self, name: str) -> None:
        del self.shapes[name]
        for layer in self.layers.values():
            layer.remove(name)
        if self.routing.folded == name:
            self.routing.folded = None

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The factors by module name: `<module>.lora_A` (rank, in) and `<module>.lora_B` (out, rank)."""
        factors: dict[str, nn.Parameter] = {}
        for module, layer in self.layers.items():
            factors[f"{module}.lora_A"] = layer.lora_A[name]
            factors[f"{module}.lora_B"] = layer.lora_B[name]
        return factors

    def assign(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Copy factors in by name. Raises ConfigurationError where names or shapes differ."""
        own = self.parameters(name)
        if missing := sorted(own.keys() ^ values.keys()):
            raise ConfigurationError(f"the adapter's layers don't match this base model's; the first that differs: {missing[0]}")
        for key, parameter in own.items():
            if parameter.shape != values[key].shape:
                raise ConfigurationError(f"{key} has the shape {tuple(values[key].shape)}; this base model needs {tuple(parameter.shape)}")
            parameter.data.copy_(values[key])

    @contextmanager
    def use(self, active: Active, *, fold: bool = False) -> Iterator[None]:
        """Apply one adapter, groups of rows, or none, inside the block. `fold` pays one pass over the weights once to make
        every forward as cheap as the bare base's; without gradients only."""
        before = self.routing.active
        if fold and isinstance(active, str):
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.fold(active)
            self.routing.folded = active
        else:
            self.routing.folded = None
        self.routing.active = active
        try:
            yield
        finally:
            self.routing.active, self.routing.folded = before, None

    def save(self, name: str, directory: Path, base_model: str) -> None:
        """Write the adapter in PEFT's format into an existing directory."""
        shape = self.shapes[name]
        tensors = {f"{PEFT_PREFIX}{key}.weight": value.detach().cpu().contiguous() for key, value in self.parameters(name).items()}
        save_file(tensors, directory / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": shape.rank,
            "lora_alpha": shape.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({module.rpartition(".")[2] for module in self.layers}),
            "inference_mode": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
        }
        (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=1, sort_keys=True))

    def load(self, name: str, directory: Path, *, trainable: bool = False) -> None:
        """Read an adapter in PEFT's format. Raises ConfigurationError with the reason; then nothing is left half-loaded."""
        shape, values = read_adapter(directory)
        self.add(name, shape, trainable=trainable)
        try:
            self.assign(name, values)
        except BaseException:
            self.remove(name)
            raise


def read_adapter(directory: Path) -> tuple[LoraShape, dict[str, Tensor]]:
    """Shape and factors of an adapter in PEFT's format. Raises ConfigurationError where it is missing or not plain LoRA."""
    try:
        config = json.loads((directory / ADAPTER_CONFIG_NAME).read_text())
        tensors = load_file(directory / ADAPTER_WEIGHTS_NAME)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigurationError(f"no readable adapter in {directory.name}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigurationError("the adapter is not a LoRA adapter")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise ConfigurationError(f"the adapter uses {option}, which is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not (isinstance(rank, int) and rank > 0):
        raise ConfigurationError("the adapter's r must be a positive whole number")
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha <= LARGEST_ALPHA):
        raise ConfigurationError(f"the adapter's lora_alpha must be a positive number of at most {LARGEST_ALPHA:,}")
    values: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not (key.startswith(PEFT_PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise ConfigurationError(f"the adapter holds the tensor {key}, which is not a LoRA factor")
        if value.dim() != 2 or value.shape[0 if key.endswith(".lora_A.weight") else 1] != rank:  # before memory is taken for that rank
            raise ConfigurationError(f"{key} has the shape {tuple(value.shape)}, which does not fit the adapter's rank {rank}")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ConfigurationError(f"{key} holds something else than finite floating-point numbers")
        values[key.removeprefix(PEFT_PREFIX).removesuffix(".weight")] = value
    return LoraShape(rank, alpha), values  # type: ignore[arg-type]
