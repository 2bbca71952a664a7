# The CPU environment: what continuous integration sets up, and the smoke test as its command.
# docker build -f containers/cpu.Dockerfile -t meshwright:cpu .
# docker run --rm --shm-size=1g meshwright:cpu
FROM python:3.11.13-slim-bookworm

# DeepSpeed's set-up compiles nothing here, but its CPU optimizer does when it is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/meshwright
COPY bootstrap.sh constraints.txt pyproject.toml README.md LICENSE ./
COPY launcher launcher
COPY strategies strategies
COPY hydra_configs hydra_configs
ENV MESHWRIGHT_TORCH=cpu
RUN ./bootstrap.sh

ENV PATH=/opt/meshwright/.venv/bin:$PATH
ENTRYPOINT ["meshwright"]
CMD ["train", "experiment=smoke", "run_dir=/tmp/smoke_run"]
