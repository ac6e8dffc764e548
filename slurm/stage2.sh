#!/usr/bin/env bash
#SBATCH --job-name=lectern-stage2
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#
# Train stage 2, one task a GPU: all GPUs of one node unless sbatch is told otherwise.
#
#   sbatch slurm/stage2.sh                                          # configs/stage2.yaml
#   sbatch --nodes=2 slurm/stage2.sh my/stage2.yaml run.dir=runs/x optim.lr=5e-6
#
# To be submitted from the clone. docs/slurm.md has the rest.
lib=${SLURM_SUBMIT_DIR:-.}/slurm/lib.sh
if [ ! -r "$lib" ]; then
  echo "there is no $lib: call sbatch in the clone, as \`sbatch slurm/stage2.sh\`" >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
source "$lib"
prepare
exec "$python" -m launch.stage --default configs/stage2.yaml "$@"
