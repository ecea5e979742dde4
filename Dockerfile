# Three images from one file: docker build --target gateway|trainer|model-server .
# The trainer for an NVIDIA GPU: docker build --target trainer --build-arg EXTRA=gpu .
ARG EXTRA=trainer
FROM python:3.13-slim AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH TEMPER_HOME=/var/lib/temper TEMPER_HOST=0.0.0.0
RUN useradd --system --uid 10001 --create-home temper && install -d -o temper /var/lib/temper

FROM base AS gateway-build
COPY requirements/gateway.txt /tmp/
RUN python -m venv /opt/venv && pip install --require-hashes -r /tmp/gateway.txt

FROM base AS tensorflow-build
ARG EXTRA
COPY requirements/${EXTRA}.txt /tmp/requirements.txt
RUN python -m venv /opt/venv && pip install --require-hashes -r /tmp/requirements.txt

# HTTP. No TensorFlow in here; it reads trainer/ and serving/ only as far as they need none.
FROM base AS gateway
COPY --from=gateway-build /opt/venv /opt/venv
WORKDIR /app
COPY api api
COPY trainer trainer
COPY serving serving
COPY store store
USER 10001
VOLUME /var/lib/temper
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
CMD ["python", "-m", "api"]

FROM base AS trainer
COPY --from=tensorflow-build /opt/venv /opt/venv
WORKDIR /app
COPY trainer trainer
COPY serving serving
COPY store store
USER 10001
VOLUME /var/lib/temper
CMD ["python", "-m", "trainer"]

# The embedded model server, for where no TensorFlow Serving is to be had.
FROM base AS model-server
COPY --from=tensorflow-build /opt/venv /opt/venv
WORKDIR /app
COPY serving serving
COPY store store
USER 10001
EXPOSE 8500 8501
CMD ["python", "-m", "serving", "--address", "0.0.0.0:8500", "--rest-address", "0.0.0.0:8501"]
