# Two images: `server` for what docker-compose.yml runs around MLflow, `worker` for obowlab itself.
# `make images` builds both and tells the worker which commit it is made of. Python packages are those of .ci/locks/, checked by hash.

# ------------------------------------------------------------------------------------------------------------------ server
FROM python:3.12.13-slim-trixie AS server

RUN apt-get update \
    && apt-get install -y --no-install-recommends openssl postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/*

COPY .ci/locks /locks
RUN pip install --no-cache-dir --no-compile --no-deps --require-hashes -r /locks/server.txt

# A volume that is mounted here takes over the owner. The root file system is read-only when it runs: a home is /tmp.
RUN useradd --uid 1000 --no-create-home server && mkdir /scratch && chown server /scratch
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
EXPOSE 5000 8080
CMD ["mlflow", "--version"]

# ------------------------------------------------------------------------------------------------------------------ worker
# torch brings the CUDA libraries it was built for; the base brings what lets older drivers run them, and asks for GPUs.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS build

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/obowlab
ENV PATH=/opt/obowlab/bin:$PATH

WORKDIR /source
COPY .ci/locks .ci/locks
RUN pip install --no-cache-dir --no-deps --require-hashes -r .ci/locks/torch.txt \
    && pip install --no-cache-dir --no-deps --require-hashes -r .ci/locks/build.txt -r .ci/locks/demo.txt -r .ci/locks/train.txt \
    && pip install --no-cache-dir --no-deps --require-hashes --no-build-isolation -r .ci/locks/ffcv.txt
COPY pyproject.toml README.md LICENSE ./
COPY obowlab obowlab
COPY experiments experiments
COPY ablations ablations
COPY dashboards dashboards
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS worker

# What ffcv is linked with, and OpenCV's Python package, which it imports; gcc and Python's headers for torch.compile (`compile`
# of the machine file).
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc libc6-dev libgl1 libglib2.0-0t64 libopencv-core406t64 libopencv-imgproc406t64 libturbojpeg libxcb1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/obowlab /opt/obowlab
RUN ["/opt/obowlab/bin/python", "-c", "import ffcv.loader, torch, obowlab.views.ffcv_backend"]

# Uid 1000 belongs to a user of the base image. Volumes that are mounted below /lab take over the owner.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --no-create-home lab \
    && mkdir -p /lab/data /lab/runs /lab/site \
    && chown -R lab:lab /lab
ARG COMMIT=""
ENV PATH=/opt/obowlab/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OBOWLAB_DATA_ROOT=/lab/data \
    OBOWLAB_RUNS_ROOT=/lab/runs \
    OBOWLAB_COMMIT=$COMMIT
USER 1000:1000
WORKDIR /lab
ENTRYPOINT ["obowlab"]
CMD ["--help"]
