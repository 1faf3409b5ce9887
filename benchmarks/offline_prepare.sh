#!/usr/bin/env bash
# What the benchmarks need on a GPU machine without network, in folders that are small enough to be copied one by one.
#
#   benchmarks/offline_prepare.sh MODEL TEXT TASKS OUT [SIZE]
#
# MODEL  a GGUF file or a folder of transformers
# TEXT   train/*.txt, dev/<corpus>/*.txt (calibration and studies), eval/<corpus>/*.txt (what is reported)
# TASKS  longbench/*.jsonl, leval/*.jsonl, kv_retrieval/*.jsonl.gz
# SIZE   of a folder at most (40M)
#
# OUT/1, OUT/2, … hold model and text; OUT/tools the tasks, and packages for Python 3.12 beside torch, transformers,
# accelerate and peft; OUT/jieba what LongBench's Chinese tasks want besides. There: `offline_run.sh receive FOLDER` for
# each, then `start`.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 text=$2 tasks=$3 out=$4 size=${5:-40M}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}

compiled=(chardet charset-normalizer lxml xxhash)
pure=(absl-py DataProperty datasets defusedxml dill evaluate gguf hjson jieba liger-kernel==0.8.0 lm-eval==0.4.13
  mbstrdecoder more-itertools multiprocess nltk pathvalidate portalocker py-cpuinfo pytablewriter requests rouge-score
  sacrebleu sqlitedict tabledata tabulate tcolorpy typepy urllib3 word2number)

rm -rf "$out"
mkdir -p "$out"/{tools/wheels,jieba/wheels,tasks}
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/tools/wheels" "${pure[@]}"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out/tools/wheels" deepspeed  # asks torch
there=(--quiet --only-binary=:all: --python-version 3.12 --implementation cp --dest "$out/tools/wheels")
for platform in manylinux_2_{28,27,17,12}_x86_64 manylinux2014_x86_64; do there+=(--platform "$platform"); done
"$python" -m pip download --no-deps "${there[@]}" "${compiled[@]}"
"$python" -m pip download "${there[@]}" pydantic  # with the one pydantic-core that it takes
if ls "$out"/tools/wheels/*cp3*.whl | grep -v cp312; then
  echo "offline_prepare.sh: these wheels were built for this machine's Python; name them in 'compiled'" >&2
  exit 1
fi

mv "$out"/tools/wheels/jieba* "$out/jieba/wheels/"

for folder in longbench leval kv_retrieval; do cp -rL "$tasks/$folder" "$out/tasks/"; done
chmod -R u+w "$out/tasks"
"$python" "$here/short_tasks.py" --text "$text/eval" --out "$out/tasks/short"
"$python" "$here/ruler_qa.py" --longbench "$tasks/longbench" --out "$out/tasks/ruler"
tar -cJf "$out/tools/tasks.tar.xz" -C "$out" tasks
rm -r "$out/tasks"

"$python" "$here/offline.py" pack --model "$model" --text "$text" --out "$out/pieces" --sizes "$size"
for piece in "$out"/pieces/part*; do
  folder=$out/$((10#${piece##*part} + 1))
  mkdir -p "$folder" && mv "$piece" "$folder/"
done
rmdir "$out/pieces"
du -sh "$out"/*
