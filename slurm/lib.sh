# shellcheck shell=bash
# What the job scripts share: who takes part, where they meet, and how a signal and an exit code
# travel. Sourced by them from the folder that sbatch was called in, which must be the clone.

die() {
  echo "$1" >&2
  exit 2
}

# Enter the clone, take up what the site says, find Python. Leaves $python.
prepare() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: submit it with sbatch slurm/NAME.sh"
  cd "$SLURM_SUBMIT_DIR" || die "$SLURM_SUBMIT_DIR cannot be entered on $(hostname)"
  if [ -r slurm/site.sh ]; then
    # shellcheck source=slurm/site.sh
    source slurm/site.sh
  fi
  python=${LECTERN_PYTHON:-$PWD/.venv/bin/python}
  [ -x "$python" ] || die "there is no $python on $(hostname): run \`make setup\` in the clone, or \
set LECTERN_PYTHON in slurm/site.sh"
  export PYTHONUNBUFFERED=1
}

# GPUs of a node: what was asked for (`--gpus-per-node`, its type cut off), else all that the job was
# granted; an exclusive job is granted every GPU of its nodes.
count_gpus() {
  local count=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
  echo "${count##*:}"
}

# Number of ranks in all, from the GPUs of a node: one a GPU, else one a task, else one a node.
count_ranks() {
  if [ "$1" -gt 0 ]; then
    echo $((SLURM_JOB_NUM_NODES * $1))
  else
    echo "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}"
  fi
}

# CPUs of a rank, from the ranks on a node: what was asked for, else the smallest node's share.
count_cpus() {
  local smallest # of a list such as 64(x3),32
  smallest=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
  local share=$((smallest / $1))
  echo "${SLURM_CPUS_PER_TASK:-$((share > 0 ? share : 1))}"
}

# Address of the first node: its name where names resolve, else what Slurm calls its NodeAddr.
head_address() {
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if getent hosts "$name" >/dev/null; then
    echo "$name"
  else
    scontrol -o show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# A port below the ephemeral ones that neither another job nor the same job's last start uses.
rendezvous_port() {
  echo $((20000 + (SLURM_JOB_ID + 1000 * ${SLURM_RESTART_COUNT:-0}) % 10000))
}

# Tell every rank to save and stop. The controller may be busy just now: try again.
forward_usr1() {
  local pause
  for pause in 1 2 4 8 16; do
    scancel --signal=USR1 "$SLURM_JOB_ID" && return
    sleep "$pause"
  done
  echo "USR1 could not be passed on to the ranks; they stop at the time limit" >&2
}

# What each task runs: the command, its exit code added to a file. Signals are the command's.
# shellcheck disable=SC2016 # expands in the task
readonly RANK_SCRIPT='trap : TERM USR1; "${@:2}"; code=$?; echo "$code" >>"$1"; exit "$code"'

# Run a command once a rank; return the code of the first rank that failed. srun itself returns the
# highest one, which is that of a rank it killed because another had failed.
run_ranks() {
  local gpus ranks per_node cpus codes step status first
  [ -z "${SLURM_GPUS_PER_TASK:-}" ] || die "ask for --gpus-per-node instead of --gpus-per-task: \
every rank must see all GPUs of its node"
  gpus=$(count_gpus)
  ranks=$(count_ranks "$gpus")
  per_node=$(((ranks + SLURM_JOB_NUM_NODES - 1) / SLURM_JOB_NUM_NODES))
  cpus=$(count_cpus "$per_node")
  MASTER_ADDR=$(head_address)
  MASTER_PORT=$(rendezvous_port)
  [ -n "$MASTER_ADDR" ] || die "no address of the first node of $SLURM_JOB_NODELIST"
  export MASTER_ADDR MASTER_PORT
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks on" \
    "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $gpus GPUs a node," \
    "$cpus CPUs a rank, rendezvous at $MASTER_ADDR:$MASTER_PORT"
  echo "+ $*"
  codes=logs/codes-$SLURM_JOB_ID
  : >"$codes" || die "cannot write $codes: logs/ must exist in the clone"
  trap forward_usr1 USR1
  trap : TERM # the ranks get their own and save; the job must not end before them
  local options=(--ntasks="$ranks" --ntasks-per-node="$per_node" --cpus-per-task="$cpus")
  # Asked for once more: the GPUs of an exclusive job are not those of its steps.
  [ "$gpus" -eq 0 ] || options+=(--gpus-per-node="$gpus")
  srun "${options[@]}" --kill-on-bad-exit=1 --wait=60 \
    bash -c "$RANK_SCRIPT" rank "$codes" "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a trap interrupts wait
  wait "$step"
  status=$?
  first=$(grep -vx 0 "$codes" | head -n 1)
  rm -f "$codes"
  return "${first:-$status}"
}

# Train a stage: [config] [key.path=value ...], the configuration given first as the default.
train_stage() {
  local config=$1
  shift
  case ${1:-=} in
    *=* | -*) ;;
    *)
      config=$1
      shift
      ;;
  esac
  run_ranks "$python" train/main.py --config "$config" "$@"
}
