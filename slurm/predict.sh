#!/usr/bin/env bash
#SBATCH --job-name=lectern-predict
#SBATCH --output=logs/%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:USR1@120
#
# Read documents with an exported model, each task of the array its part of them; one GPU a task, or
# none. Options are those of inference.predict. Submitted again, each part goes on where it stopped.
#
#   sbatch --array=0-63 --gpus-per-node=1 slurm/predict.sh runs/invoices/stage2/hf \
#     's3://bucket/scans/*.png' --out runs/invoices/read
#   sbatch --array=0-63 --gpus-per-node=1 slurm/predict.sh configs/stage2.yaml run.dir=runs/invoices \
#     --list pages.txt --out s3://bucket/read
#
# To be submitted from the clone. docs/slurm.md has the rest.
lib=${SLURM_SUBMIT_DIR:-.}/slurm/lib.sh
if [ ! -r "$lib" ]; then
  echo "there is no $lib: call sbatch in the clone, as \`sbatch slurm/predict.sh HF_DIR PATH\`" >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
source "$lib"
prepare
[ $# -gt 0 ] || die "what is to be read? sbatch slurm/predict.sh HF_DIR PATH... --out OUT"
exec "$python" -m launch.task "$python" -m launch.job_command predict "$@"
