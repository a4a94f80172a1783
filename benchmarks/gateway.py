"""What the gateway adds to the time until the first token: the service against its inference server, asked in turn.

    .venv/bin/python -m benchmarks.gateway [--inference embedded|vllm] [--pairs 100] [--limit-ms 5]

Starts the whole service on a data directory of its own. Every pair asks both for the same streamed chat of the base model, one
directly after the other and in changing order, and takes the difference of the times until the first piece of text; nothing else
runs. Prints medians and the 95th percentile, and exits non-zero where the median difference is above the limit.
"""

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

from local_stack.ports import free_local_port

MODEL = "smollm2-135m-instruct"
WARM_UP = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inference", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--limit-ms", type=float, default=5.0, help="largest median difference")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdft-gateway-") as directory:
        port, key = free_local_port(), secrets.token_urlsafe(16)
        environment = os.environ | {"SDFT_INFERENCE_API_KEY": key}
        command = [sys.executable, "-m", "cli.main", "up", "--data-dir", directory, "--port", str(port), "--inference", options.inference]
        service = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert service.stdout is not None
            if not any("ready" in line for line in service.stdout):
                return 1
            settings = dict(line.split("=", 1) for line in (Path(directory) / "service.env").read_text().splitlines())
            direct = asking(settings["SDFT_INFERENCE_URLS"].strip("'"), key)
            through = asking(f"http://127.0.0.1:{port}", (Path(directory) / "admin.key").read_text().strip())
            pairs = measure(direct, through, options.pairs)
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(60)
    return report(pairs, options.inference, options.limit_ms)


def asking(url: str, key: str) -> Callable[[], float]:
    """What asks a server once. Returns milliseconds until the first piece of text."""
    client = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2, "temperature": 0, "stream": True}

    def ask() -> float:
        began = time.perf_counter()
        first: float | None = None
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise SystemExit(f"{url} answered {answer.status_code}: {answer.read().decode()[:500]}")
            for line in answer.iter_lines():
                if first is None and line.startswith("data: {") and has_text(line):
                    first = time.perf_counter()
        if first is None:
            raise SystemExit(f"{url} ended its answer without any text")
        return (first - began) * 1000

    return ask


def has_text(line: str) -> bool:
    return any((choice.get("delta") or {}).get("content") for choice in json.loads(line.removeprefix("data: "))["choices"])


def measure(direct: Callable[[], float], through: Callable[[], float], count: int) -> list[tuple[float, float]]:
    """Pairs (direct, through the gateway), the first asked changing from pair to pair, after a few that don't count."""
    pairs = []
    for number in range(count + WARM_UP):
        if number % 2:
            found = (direct(), through())
        else:
            later = through()
            found = (direct(), later)
        if number >= WARM_UP:
            pairs.append(found)
    return pairs


def report(pairs: list[tuple[float, float]], inference: str, limit_ms: float) -> int:
    """Print the table. Returns the exit status."""
    added = [through - direct for direct, through in pairs]
    table = Table("", "median ms", "95th percentile ms", title=f"time to the first token, {inference}, {len(pairs)} pairs, {os.cpu_count()} cores")
    for name, values in (("asked directly", [direct for direct, _ in pairs]), ("through the gateway", [through for _, through in pairs]), ("added", added)):
        table.add_row(name, f"{statistics.median(values):.1f}", f"{statistics.quantiles(values, n=20)[-1]:.1f}")
    console = Console()
    console.print(table)
    median = statistics.median(added)
    console.print(f"{median:.1f} ms added (limit {limit_ms:g}): {'kept' if median <= limit_ms else 'missed'}")
    return 0 if median <= limit_ms else 1


if __name__ == "__main__":
    sys.exit(main())
