#!/usr/bin/env bash
# Benchmarks on a GPU machine that is reached by short commands only: they run in the background, and go on between the
# commands.
#
#   benchmarks/offline_run.sh receive FOLDER …        keep what offline_prepare.sh made
#   benchmarks/offline_run.sh start SECONDS JOBS …    install, then run files of benchmarks/jobs for so long
#   benchmarks/offline_run.sh wait SECONDS OUT        until all is done, or so long; then OUT/records.tgz, logs, status
#   benchmarks/offline_run.sh weights NAME OUT FROM   four pieces of what benchmarks/jobs packed of a model, from FROM on
#
# All lies in $WORK (/tmp/e2llm). JOBS are lines for lanes.py, one job a GPU, or SHARE of them, or LANES in all; commands
# there find WORK, RECORDS, MODEL, TEXT, TASKS, SHARED and PYTHONPATH set, and run in a copy of this repository.
set -euo pipefail
export WORK=${WORK:-/tmp/e2llm}
export RECORDS=$WORK/records MODEL=$WORK/data/model TEXT=$WORK/data/text TASKS=$WORK/received/tasks
root=$(cd "$(dirname "$0")/.." && pwd)

receive() {
  mkdir -p "$WORK/received/pieces"
  for folder in "$@"; do cp -r "$folder"/. "$WORK/received/"; done
  mv "$WORK"/received/part* "$WORK/received/pieces/" 2> /dev/null || true  # of model and text, not of trained weights
  if [ -f "$WORK/received/tasks.tar.xz" ]; then
    tar -xJf "$WORK/received/tasks.tar.xz" -C "$WORK/received"
    sed -i "s|test: \".*/|test: \"$TASKS/short/|" "$TASKS"/short/*.yaml  # the harness wants whole paths
  fi
  ls "$WORK/received" "$WORK/received/pieces"
}

start() {
  local seconds=$1 gpus
  if [ -f "$WORK/lanes.pid" ] && kill -0 "$(cat "$WORK/lanes.pid")" 2> /dev/null; then
    echo "offline_run.sh: jobs are running; wait for them" >&2
    exit 1
  fi
  awk '!/^#/ && !seen[$0]++' "${@:2}" > "$WORK/jobs.txt"  # two files may begin alike
  mkdir -p "$RECORDS" "$WORK/logs" "$WORK/repository"
  cp -r "$root"/{src,benchmarks,tests,pyproject.toml} "$WORK/repository/"
  for first in "$WORK"/received/wheels/*.whl.part0; do  # a wheel that is too large for one call
    if [ -f "$first" ]; then cat "${first%0}"* > "${first%.part0}" && rm "${first%0}"*; fi
  done
  [ -d "$WORK/site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" \
    "$WORK"/received/wheels/*.whl
  cp -n "$root"/benchmarks/results/{evaluate,study}_*.json "$RECORDS/" || true  # what is measured is not measured again
  touch "$WORK/started"
  cd "$WORK/repository"
  export PYTHONPATH=$WORK/repository/src:$WORK/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  if [ "${SHARE:-1}" -gt 1 ]; then SHARED=--shared-gpu; fi
  export SHARED=${SHARED:-}  # for runs whose training is timed, unless they are alone
  export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton
  python3 -c "import e2llm.cli"
  for package in datasets gguf jieba liger_kernel lm_eval.api.model; do
    python3 -c "import $package" 2> /dev/null || echo "no $package here"
  done
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  setsid nohup python3 benchmarks/lanes.py "$WORK/jobs.txt" --gpus "${LANES:-$((gpus > 0 ? gpus : 1))}" \
    --share "${SHARE:-1}" --until "$seconds" --logs "$WORK/logs" --done "$WORK/done" > "$WORK/lanes.log" 2>&1 < /dev/null &
  echo $! > "$WORK/lanes.pid"
  echo "$gpus GPUs, $(wc -l < "$WORK/jobs.txt") jobs for $seconds s"
}

wait_for() {
  local end=$((SECONDS + $1)) out=$2
  while [ "$SECONDS" -lt "$end" ] && ! grep -q "^not finished:" "$WORK/lanes.log" && kill -0 "$(cat "$WORK/lanes.pid")"
  do sleep 1; done
  mkdir -p "$out"
  (cd "$WORK" && find records logs final -type f -newer started \( -path "records/*" -o -name "*.log" -o -name recipe.toml \
    -o -name train.json -o -name calibration.json -o -name evaluation.partial.jsonl \) 2> /dev/null; ls *.profile.txt lanes.log
  ) 2> /dev/null | tar -czf "$out/records.tgz" -C "$WORK" -T - || true
  for log in $(ls -t "$WORK"/logs/*.log); do echo "== $log"; tr '\r' '\n' < "$log" | sed '/^ *$/d' | tail -n 6; done
  cat "$WORK/lanes.log"
  find "$RECORDS" -newer "$WORK/started" -type f -printf '%f\n'
}

weights() {
  local from=$3
  mkdir -p "$2"
  for i in 0 1 2 3; do cp "$WORK/packed/$1/part$((from + i))" "$2/" 2>/dev/null || true; done
  ls "$WORK/packed/$1" | wc -l
}

case ${1:-} in
  receive) receive "${@:2}" ;;
  start) start "${@:2}" ;;
  wait) wait_for "$2" "$3" ;;
  weights) weights "$2" "$3" "$4" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
