# shellcheck shell=bash
# What the job scripts share. Sourced by them from the folder that sbatch was called in, which must
# be the clone. What a job then does is Python's: launch/stage.py and launch/task.py.

die() {
  echo "$1" >&2
  exit 2
}

# Enter the clone, take up what the site says, find Python. Leaves $python.
prepare() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: submit it with sbatch slurm/NAME.sh"
  trap '' USR1 # until Python catches it: the first seconds of a job have nothing to save
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
