#!/usr/bin/env bash
# What runs in llama.cpp itself: exported files, the llamacpp engine, and the HTTP server over it. In a virtual environment
# of its own, because llama-cpp-python is built from source there: some five minutes on two cores, and less once pip has
# kept the wheel. Give a folder to keep the environment: scripts/ci_llamacpp.sh .venv-llamacpp
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-}
if [ -z "$venv" ]; then
  venv=$(mktemp -d)/venv
  trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
make "$venv/.installed-dev" VENV="$venv"
CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} \
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[llamacpp]'
"$venv/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
"$venv/bin/python" -m pytest -m "not gpu" tests/llamacpp tests/export/test_llamacpp.py tests/export/test_open_gguf.py
"$venv/bin/python" -m pytest -k llamacpp tests/server tests/chat tests/benchmark
