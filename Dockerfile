# syntax=docker/dockerfile:1
# A batch image with `coldstill` as its command. docs/container.md has the lines to build and run it.
#   docker build -t coldstill .                              # for NVIDIA GPUs
#   docker build -t coldstill:cpu --build-arg DEVICE=cpu .   # vLLM and torch for CPUs
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-trixie

# vLLM and torch.compile build kernels at run time. On the CPU they need C++ and NUMA too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
ARG DEVICE=gpu
WORKDIR /opt/coldstill
ENV UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    PYTHONUNBUFFERED=1

# Three layers, from the one that changes least: torch, all other packages, Coldstill. A new version of Coldstill is a
# download of a few megabytes on a machine that has the last one.
COPY requirements/cpu.in requirements/cpu.txt requirements/gpu.txt requirements/overrides.txt requirements/uv.py \
    requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    python -m pip install --no-cache-dir "$(grep '^uv==' "requirements/${DEVICE}.txt")" \
    && grep '^torch==' "requirements/${DEVICE}.txt" >torch.txt \
    && python requirements/uv.py "${DEVICE}" pip install --cache-dir /var/cache/uv --system --requirement torch.txt \
        --constraint "requirements/${DEVICE}.txt"

COPY pyproject.toml ./
RUN --mount=type=cache,target=/var/cache/uv \
    if [ "${DEVICE}" = cpu ]; then set -- --extra capture-cpu --override requirements/overrides.txt; \
    else set -- --extra capture; fi \
    && python requirements/uv.py "${DEVICE}" pip install --cache-dir /var/cache/uv --system --requirement pyproject.toml "$@" \
        --extra train --extra share --constraint "requirements/${DEVICE}.txt"

COPY . source
RUN --mount=type=cache,target=/var/cache/uv \
    python requirements/uv.py "${DEVICE}" pip install --cache-dir /var/cache/uv --system --no-deps ./source \
    && mv source/examples examples \
    && rm -rf source

# Not root: `/data` is for sources, datasets and runs, and the home folder holds caches of models and of shards, and
# Triton's in `.triton`. All are writable for any user, so that `docker run --user` can be the one who owns the mounted
# folder.
RUN useradd --create-home --uid 1000 coldstill \
    && install --directory --mode 1777 /data /home/coldstill /home/coldstill/.cache
USER 1000:1000
WORKDIR /data
# A user without an entry in /etc/passwd has neither, and torch's compiler needs a name.
ENV HOME=/home/coldstill USER=coldstill

ENTRYPOINT ["coldstill"]
CMD ["--help"]
