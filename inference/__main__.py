"""Start the server: `python -m inference --base-model ID --model-dir DIR --port P --adapters-dir DIR`.

Torch is imported only after the environment is set: its threads must not spin while they are idle, or two torch
processes on one machine slow each other to a quarter.
"""

import argparse
import os
import sys
from pathlib import Path

GRACEFUL_SHUTDOWN_SECONDS = 5
MAX_CONNECTIONS = 900
"""Beyond which requests are answered 503: 1,024 descriptors are a usual limit."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inference", description="Serve one base model and its adapters over HTTP.")
    parser.add_argument("--base-model", required=True, metavar="ID", help="the name that the base answers to")
    parser.add_argument("--model-dir", required=True, type=Path, help="the prepared base model")
    adapters = parser.add_mutually_exclusive_group(required=True)
    adapters.add_argument("--adapters-dir", type=Path, metavar="DIR", help="adapters are loaded from inside this directory only")
    adapters.add_argument("--uploads-dir", type=Path, metavar="DIR", help="the same, for this server alone: adapters are sent to it, with the key")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8809)
    parser.add_argument("--threads", type=_at_least_one, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--max-batch", type=_at_least_one, default=16, help="sequences that are decoded together")
    parser.add_argument("--max-adapters", type=_at_least_one, default=64, help="adapters held; the one used longest ago makes room for another")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: SDFT_DEVICE, else auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: SDFT_DTYPE, else auto")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--api-key-env", default="SDFT_INFERENCE_API_KEY", metavar="NAME", help="environment variable with the bearer key, if any")
    return parser.parse_args(_words_of_the_environment() + (sys.argv[1:] if arguments is None else arguments))


def _words_of_the_environment() -> list[str]:
    """What the trainers are told too, for a container whose command names neither. First, so that the command line wins."""
    variables = {"--device": "SDFT_DEVICE", "--dtype": "SDFT_DTYPE"}
    return [word for option, variable in variables.items() if (value := os.environ.get(variable)) for word in (option, value)]


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main() -> int:
    arguments = parse_arguments()
    api_key = os.environ.get(arguments.api_key_env) or None
    if arguments.uploads_dir and not api_key:
        sys.stderr.write(f"--uploads-dir needs a key in {arguments.api_key_env}: whoever reaches this server could send it adapters\n")
        return 1
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch
    import uvicorn

    from inference.app import create_app
    from inference.engine import Engine
    from sdft_engine.contract.errors import EngineError
    from sdft_engine.model import load_base_model

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        model = load_base_model(arguments.model_dir, device=arguments.device, dtype=arguments.dtype)
    except EngineError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    engine = Engine(model, max_batch=arguments.max_batch)
    takes_uploads = arguments.uploads_dir is not None
    adapters_dir = arguments.uploads_dir if takes_uploads else arguments.adapters_dir
    options = {"base_model_id": arguments.base_model, "api_key": api_key, "max_adapters": arguments.max_adapters}
    try:
        app = create_app(engine, adapters_dir=adapters_dir, takes_uploads=takes_uploads, **options)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        server_header=False,
        http="h11",  # bounds a request's headers, which httptools does not
        limit_concurrency=MAX_CONNECTIONS,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
