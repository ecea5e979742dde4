# Three images from one file: docker build --target gateway|trainer|model-server .
# The trainer for an NVIDIA GPU: docker build --target trainer --build-arg EXTRA=gpu .
# BASE is a Debian with Python 3.11 to 3.13, BUILD_BASE the same with its venv module and binutils; `make images` makes
# both with debootstrap.
ARG BASE=python:3.13-slim
ARG BUILD_BASE=python:3.13
ARG EXTRA=trainer

# hadolint ignore=DL3006
FROM ${BASE} AS base
# HOME: Keras writes its settings there when TensorFlow is imported, and only the volume and /tmp need be writable.
ENV HOME=/tmp PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    TEMPER_HOME=/var/lib/temper TEMPER_HOST=0.0.0.0
RUN groupadd --gid 10001 temper \
    && useradd --no-log-init --uid 10001 --gid 10001 --create-home temper \
    && install -d -o temper -g temper /var/lib/temper \
    && printf '#!/bin/sh\nexec python -m cli "$@"\n' > /usr/local/bin/temper \
    && chmod 755 /usr/local/bin/temper
WORKDIR /app

# hadolint ignore=DL3006
FROM ${BUILD_BASE} AS build
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# Bytecode comes along: containers have a read-only root file system, and would compile again at every start.
FROM build AS gateway-build
COPY requirements/gateway.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-compile --require-hashes -r /tmp/requirements.txt \
    && python -m pip uninstall --yes pip setuptools
COPY . .
RUN python -m deploy.slim

FROM build AS trainer-build
ARG EXTRA
COPY requirements/${EXTRA}.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --require-hashes -r /tmp/requirements.txt \
    && python -m pip uninstall --yes pip
COPY . .
RUN python -m compileall -q /app

# HTTP, and `temper` for operators. No TensorFlow in here: it reads trainer/ and serving/ as far as they need none.
FROM base AS gateway
COPY --from=gateway-build /opt/venv /opt/venv
COPY --from=gateway-build /app /app
USER 10001
VOLUME /var/lib/temper
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "-m", "deploy.healthcheck", "gateway"]
CMD ["python", "-m", "api"]

# The login shell in which KubeRay starts Ray sets its own PATH.
FROM base AS trainer
RUN echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/temper.sh
COPY --from=trainer-build /opt/venv /opt/venv
COPY --from=trainer-build /app /app
USER 10001
VOLUME /var/lib/temper
# It is healthy once it is ready for jobs, which takes a model server.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-m", "deploy.healthcheck", "trainer"]
CMD ["python", "-m", "trainer"]

# The embedded model server, for where no TensorFlow Serving is to be had. It shares every layer with the trainer.
FROM trainer AS model-server
EXPOSE 8500 8501
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-m", "deploy.healthcheck", "model-server"]
CMD ["python", "-m", "serving", "--address", "0.0.0.0:8500", "--rest-address", "0.0.0.0:8501"]
