#!/usr/bin/env bash
# Make .venv/ in this checkout with everything the example run and the tests need. Run again: nothing happens twice.
# MESHWRIGHT_TORCH=cpu|cuda: which build of PyTorch, where this machine is not the one that will train (an image, say).
set -euo pipefail
cd "$(dirname "$0")"

find_python() { # the newest tested first; a version manager's stub may exist without working
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.10 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "bootstrap.sh: no Python 3.10 or newer found; install one, or set PYTHON=/path/to/python" >&2
    exit 1
}

[ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

torch_version=$(sed -n 's/^torch==//p' constraints.txt)
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    command -v nvidia-smi >/dev/null 2>&1 && found=cuda || found=cpu
    if [ "$(uname -s)" != Linux ] || [ "${MESHWRIGHT_TORCH:-$found}" = cuda ]; then
        pip install "torch==$torch_version" -c constraints.txt
    # The default Linux build brings several GB of CUDA packages that a machine without a GPU cannot use.
    elif ! pip install "torch==$torch_version+cpu" 2>/dev/null; then
        pip install uv
        .venv/bin/uv pip install --python .venv/bin/python --torch-backend=cpu "torch==$torch_version"
    fi
fi
# DeepSpeed's own build looks at the installed torch, so it must not build in isolation.
pip install setuptools wheel ninja -c constraints.txt
pip install --no-build-isolation -c constraints.txt -e '.[deepspeed,megatron,prometheus,tensorboard,wandb,dev]'
touch .venv/ready
