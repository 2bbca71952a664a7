# The CUDA environment, with the engines that need one of their own beside it. The CUDA of the image is the one that
# PyTorch's build carries, so that DeepSpeed's and ColossalAI's kernels compile against the same; the driver is the host's.
# docker build -f containers/cuda.Dockerfile -t meshwright:cuda .
# docker run --rm --gpus=all --ipc=host --ulimit=memlock=-1 -v "$PWD/runs:/runs" meshwright:cuda \
#     train strategy=colossalai run_dir=/runs/one
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/meshwright
COPY bootstrap.sh constraints.txt pyproject.toml README.md LICENSE ./
COPY launcher launcher
COPY strategies strategies
COPY hydra_configs hydra_configs
# There is no driver while an image is built: say which build of PyTorch is meant.
ENV MESHWRIGHT_TORCH=cuda
RUN ./bootstrap.sh

ENV PATH=/opt/meshwright/.venv/bin:$PATH MESHWRIGHT_HOME=/opt/meshwright/home
RUN meshwright env create colossalai
ENTRYPOINT ["meshwright"]
CMD ["env", "list"]
