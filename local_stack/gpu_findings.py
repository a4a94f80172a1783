"""`sdft doctor` on GPUs: whether the driver, torch and the settings mean the same ones.

torch is asked in a process of its own, because importing it takes seconds, and only where the driver lists a GPU or the settings
insist on one.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from core.settings import Settings
from local_stack.finding import Finding
from local_stack.up import missing_training_packages

DRIVER_LIMIT_SECONDS = 20
TORCH_LIMIT_SECONDS = 120
TORCH_QUESTION = """
import json, torch
print(json.dumps({"built_for": torch.version.cuda, "found": torch.cuda.device_count() if torch.cuda.is_available() else 0}))
"""
INSTALL_TORCH = "install a torch that is built for CUDA: pip install --force-reinstall torch --extra-index-url URL_OF_THE_CUDA_BUILDS"
INSTALL_DRIVER = "install the GPU's driver (nvidia-smi then lists it), give the container the GPU, or set SDFT_DEVICE=auto"


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi lists: `names` as SDFT_DEVICES may write them, `uuids` of whole GPUs; `problem` where it lists nothing."""

    names: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()
    problem: str | None = None


def gpu_findings(settings: Settings) -> list[Finding]:
    if settings.device == "cpu":
        return []
    driver = ask_driver()
    wanted = [name for name in settings.devices or [] if name != "cpu"]
    insisted = settings.device == "cuda" or bool(wanted)
    if not driver.uuids and not insisted:
        return [] if driver.problem is None else [Finding("GPU driver", driver.problem, INSTALL_DRIVER, is_warning=True)]
    findings = [] if "torch" in missing_training_packages() else [_torch(driver, insisted, settings)]
    return [*findings, *_devices(wanted, driver)]


def ask_driver() -> Driver:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver()
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=DRIVER_LIMIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(problem=f"nvidia-smi doesn't answer: {error}")
    if answer.returncode != 0:
        said = (answer.stdout.strip() or answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[0]
        return Driver(problem=f"nvidia-smi lists no GPU: {said}")
    indices = re.findall(r"^GPU (\d+):", answer.stdout, re.MULTILINE)
    uuids = re.findall(r"UUID: (GPU-[^)\s]+)", answer.stdout)
    slices = re.findall(r"UUID: (MIG-[^)\s]+)", answer.stdout)
    return Driver((*indices, *uuids, *slices), tuple(uuids))


def _torch(driver: Driver, insisted: bool, settings: Settings) -> Finding:
    what = (
        f"torch for SDFT_DEVICE{'=cuda' if settings.device == 'cuda' else 'S'}" if insisted else f"torch and the {len(driver.uuids)} GPUs that the driver lists"
    )
    try:
        answer = subprocess.run([sys.executable, "-P", "-c", TORCH_QUESTION], capture_output=True, text=True, timeout=TORCH_LIMIT_SECONDS)
        told = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        return Finding(what, f"torch didn't answer within {TORCH_LIMIT_SECONDS} s", INSTALL_TORCH)
    except ValueError:
        reason = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        return Finding(what, f"torch doesn't run: {reason}", INSTALL_TORCH)
    if told["found"]:
        return Finding(f"{what} ({told['found']} CUDA devices)", None)
    if told["built_for"] is None:
        return Finding(what, "torch is built without CUDA" + ("" if insisted else ", so jobs train on the CPU"), INSTALL_TORCH, is_warning=not insisted)
    if not driver.uuids:
        return Finding(what, f"torch is built for CUDA {told['built_for']} and finds no CUDA device: {driver.problem or 'there is no driver'}", INSTALL_DRIVER)
    problem = f"torch is built for CUDA {told['built_for']} and finds no CUDA device, though the driver lists {len(driver.uuids)}"
    return Finding(what, problem, "update the driver to one that knows this CUDA version, or unset CUDA_VISIBLE_DEVICES", is_warning=not insisted)


def _devices(wanted: list[str], driver: Driver) -> list[Finding]:
    """Names may be shortened as CUDA_VISIBLE_DEVICES allows it: `GPU-8932f937`."""
    if not wanted:
        return []
    absent = [name for name in wanted if not any(name == there or (name[:4] in ("GPU-", "MIG-") and there.startswith(name)) for there in driver.names)]
    what = f"SDFT_DEVICES={','.join(wanted)}"
    if not absent:
        return [Finding(what, None)]
    listed = ", ".join(driver.names) or "none"
    mend = f"write SDFT_DEVICES={','.join(driver.uuids)}" if driver.uuids else "unset SDFT_DEVICES"
    return [Finding(what, f"there is no {', '.join(absent)}; the driver lists: {listed}", mend)]
