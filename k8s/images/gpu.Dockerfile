# MemShare for pods with NVIDIA GPUs. The driver comes from the node, CUDA's libraries from PyPI.
#
#   docker build --file k8s/images/gpu.Dockerfile --tag memshare-gpu:0.1.0 .
#
# Packages are those of constraints.txt. What vLLM's CPU build needs as well, the tests ran with.

FROM python:3.11.14-slim-bookworm AS build
ENV PATH=/opt/memshare/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/memshare/venv
WORKDIR /src
# Dependencies first: their layer, by far the largest, stays while only our code changes.
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY memshare/__init__.py memshare/
RUN pip install --constraint constraints.txt ".[gpu,serve,eval]" \
    && pip uninstall --yes memshare
COPY memshare memshare
COPY cluster cluster
COPY configs configs
RUN pip install --no-deps .
COPY configs /opt/memshare/configs
COPY tools /opt/memshare/tools

FROM python:3.11.14-slim-bookworm
# Triton compiles small C files when an engine starts. No pinned versions: Debian keeps only the
# newest of each, and a pinned one could not be built tomorrow.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 openssl \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 memshare \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/memshare memshare
COPY --from=build /opt/memshare /opt/memshare
ENV PATH=/opt/memshare/venv/bin:$PATH \
    HOME=/home/memshare \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/memshare
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/-/healthz')"]
CMD ["serve", "run", "/opt/memshare/configs/single-gpu.yaml"]
