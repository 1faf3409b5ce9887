#!/usr/bin/env bash
# The plugin in axolotl itself, on the CPU: a virtual environment from nothing, axolotl and what a run of it imports,
# tests/test_axolotl_plugin.py, and the draws of packed documents on axolotl's own version of transformers.
#
# axolotl's whole list of dependencies holds builds for CUDA (xformers, flash-linear-attention), so it is installed
# without it and what it needs is named here. Needs a CPU build of PyTorch, as ci_vllm.sh does; where pip finds none, the
# tests are not run, and this says so. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
axolotl='axolotl==0.19.0'
torch='torch==2.13.0+cpu'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
if ! pip install "$torch" >"$work/pip.log" 2>&1; then
  echo "NOT RUN: tests of the plugin in axolotl. pip finds no $torch: $(grep -m 1 ERROR "$work/pip.log")"
  exit 0
fi
pip install "$torch" huggingface_hub==1.17.0 peft==0.20.0 tokenizers==0.23.1 transformers==5.16.1 accelerate==1.13.0 \
  datasets==4.8.4 trl==1.9.0 'kernels>=0.16,<0.17' pydantic==2.12.5 addict fire PyYAML requests einops colorama \
  'numba>=0.63.1' 'numpy>=2.1,<3' typer scipy nvidia-ml-py==12.560.30 art python-dotenv zstandard==0.22.0 \
  schedulefree==1.4.1 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 posthog==6.7.11 sentencepiece \
  hf_transfer evaluate==0.4.1 optimum==1.16.2 langdetect immutabledict fastcore triton wandb pydantic_extra_types \
  pycountry s3fs gcsfs matplotlib rich safetensors 'pytest>=8,<10' 'pytest-timeout>=2,<3'
pip install --no-deps "$axolotl" bitsandbytes liger-kernel==0.8.1 torchao==0.17.0 mistral-common==1.11.5 trackio==0.19.0
pip install --no-deps -e .
OMP_NUM_THREADS=1 "$work/venv/bin/python" -m pytest tests/test_axolotl_plugin.py \
  tests/hf/test_packed_documents.py --durations 5
