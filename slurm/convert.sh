#!/usr/bin/env bash
#SBATCH --job-name=lectern-convert
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#
# Export a stage to a Hugging Face folder; needs no GPU. Options are those of train.export.
#
#   sbatch slurm/convert.sh configs/stage1.yaml run.dir=runs/invoices
#   sbatch slurm/convert.sh runs/invoices/stage2 --step 1200 --out /models/invoices
#
# To be submitted from the clone. docs/slurm.md has the rest.
lib=${SLURM_SUBMIT_DIR:-.}/slurm/lib.sh
if [ ! -r "$lib" ]; then
  echo "there is no $lib: call sbatch in the clone, as \`sbatch slurm/convert.sh RUN/stageN\`" >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
source "$lib"
prepare
[ $# -gt 0 ] || die "which stage? sbatch slurm/convert.sh RUN/stageN [options of train.export]"
exec "$python" -m launch.task "$python" -m launch.job_command convert "$@"
