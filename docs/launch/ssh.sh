#!/bin/bash
# Plain ssh: one process on each machine, which uses all its GPUs.
#   HOSTS="node1 node2" DIR=/shared/nanochat_jax docs/launch/ssh.sh --config=configs/config_b.py \
#     --workdir=/shared/runs/b --config.mesh.data=4
# DIR is the same directory everywhere. Ctrl-C stops all processes at the same step, with a checkpoint.
set -u
read -ra hosts <<<"$HOSTS"
port=${PORT:-61440}
words=$(printf ' %q' "$@")
note=/tmp/nanochat_jax.$port.pid # on the first machine
pids=()
for i in "${!hosts[@]}"; do
  ssh "${hosts[$i]}" "cd $(printf %q "$DIR") && { [[ $i != 0 ]] || echo \$\$ > $note; } && \
    exec python -u -m nanochat_jax.train$words \
    --coordinator=${hosts[0]}:$port --num_processes=${#hosts[@]} --process_id=$i" </dev/null &
  pids+=($!)
done
# A signal to one process is enough: it tells the others.
trap 'ssh "${hosts[0]}" "kill -TERM \$(cat $note)"' INT TERM
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
