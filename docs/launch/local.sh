#!/bin/bash
# N processes on this machine, a GPU each if there are any; on a CPU one fake device each.
#   docs/launch/local.sh 2 --config=configs/smoke.py --workdir=runs/two --config.mesh.data=2
# One process per machine is simpler and as fast (it drives all GPUs); this is for trying things out.
set -u
count=$1
shift
port=${PORT:-61440}
pids=()
for ((i = 0; i < count; i++)); do
  if command -v nvidia-smi >/dev/null; then export CUDA_VISIBLE_DEVICES=$i; fi
  python -u -m nanochat_jax.train "$@" \
    --coordinator=localhost:"$port" --num_processes="$count" --process_id="$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  while kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait` early
    wait "$pid"
    status=$?
  done
  ((status)) && worst=$status
done
exit "$worst"
