ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# gcc compiles what launches the kernels of a compiled trunk (training.compile). The fonts write
# Chinese, Japanese and Korean names of classes into pictures.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev fonts-droid-fallback \
 && rm -rf /var/lib/apt/lists/*

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# A layer of its own: 7 GB that change only with the lock. By uv, which the lock names too; by pip,
# in minutes more, where only pip's own settings lead to the packages.
COPY requirements.lock /opt/sam3-finetuning/
RUN sed -n '/^uv==/,/[^\\]$/p' /opt/sam3-finetuning/requirements.lock > /tmp/uv.lock \
 && pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps \
      --requirement /tmp/uv.lock \
 && { uv pip install --system --no-cache --system-certs --compile-bytecode --require-hashes \
        --no-deps --requirement /opt/sam3-finetuning/requirements.lock \
   || pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps \
        --requirement /opt/sam3-finetuning/requirements.lock; } \
 && rm /tmp/uv.lock

# PYTHONSAFEPATH: an `app` in the user's folder must not take the place of ours.
# HOME: writable by any uid, as runs are made under that of the caller; all caches lie below it.
# USER: torch names a cache after it, and the caller's uid has no name in here.
ENV PYTHONPATH=/opt/sam3-finetuning \
    PYTHONSAFEPATH=1 \
    HOME=/tmp/home \
    USER=sam3
COPY LICENSE /opt/sam3-finetuning/
COPY configs/ /opt/sam3-finetuning/configs/
COPY app/ /opt/sam3-finetuning/app/

ARG SAM3_COMMIT=84cc43bca4347b772f17d1078a1ddb4c054655c2
RUN python -c "import sys; from app.model.upstream.pin import COMMIT, prove_pin; prove_pin(); \
sys.exit(None if sys.argv[1] == COMMIT else f'SAM3_COMMIT is {sys.argv[1]}, the pin is {COMMIT}')" \
      "${SAM3_COMMIT}" \
 && find /opt/sam3-finetuning ! -perm -o=r -exec chmod a+rX {} + \
 && install --directory --mode 1777 \
      /mlflow /tmp/home /tmp/home/.cache /tmp/home/.cache/huggingface

LABEL org.opencontainers.image.title="sam3-finetuning" \
      org.opencontainers.image.description="Teach SAM 3 to find your things" \
      org.opencontainers.image.licenses="Apache-2.0" \
      sam3.commit="${SAM3_COMMIT}"

# No HEALTHCHECK: the command line runs and ends. The service in docker-compose.yml has its own.
USER 1000:1000
WORKDIR /tmp/home
ENTRYPOINT ["python", "-m", "app"]
CMD ["--help"]
