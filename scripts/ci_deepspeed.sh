#!/usr/bin/env bash
# ZeRO-2 and ZeRO-3 in DeepSpeed itself, two gloo processes on the CPU: a virtual environment from nothing, DeepSpeed and
# e2llm in it, and the test that sets its run beside one process. Five to ten minutes on two cores: DeepSpeed compiles its
# exchange between processes, for which it needs a C++ compiler. Give a folder to keep the environment:
# scripts/ci_deepspeed.sh .venv-zero
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}
make "$venv/.installed-dev" VENV="$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[deepspeed]'
# Compiled here, once: inside a test the compiler's minutes would count as the test's. ninja comes with DeepSpeed.
export TORCH_EXTENSIONS_DIR=$work/extensions PATH="$(cd "$venv/bin" && pwd):$PATH" CUDA_VISIBLE_DEVICES=
"$venv/bin/python" - <<'PYTHON'
import deepspeed
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

print("deepspeed", deepspeed.__version__)
ShareMemCommBuilder().load()
PYTHON
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -m slow -k deepspeed tests/train/test_distributed.py --durations 2
