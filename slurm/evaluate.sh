#!/usr/bin/env bash
#SBATCH --job-name=lectern-evaluate
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#
# Measure how well an exported model reads shards; one GPU, or none. Options are those of
# inference.evaluate; with a stage's YAML, shards and report folder are the stage's own by default.
#
#   sbatch --gpus-per-node=1 slurm/evaluate.sh                      # configs/stage2.yaml
#   sbatch --gpus-per-node=1 slurm/evaluate.sh configs/stage2.yaml run.dir=runs/invoices --num 500
#   sbatch --gpus-per-node=1 slurm/evaluate.sh runs/invoices/stage2/hf 'data/shards/val-*.tar' \
#     --out runs/invoices/stage2/report
#
# To be submitted from the clone. docs/slurm.md has the rest.
lib=${SLURM_SUBMIT_DIR:-.}/slurm/lib.sh
if [ ! -r "$lib" ]; then
  echo "there is no $lib: call sbatch in the clone, as \`sbatch slurm/evaluate.sh\`" >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
source "$lib"
prepare
[ $# -gt 0 ] || set -- configs/stage2.yaml
exec "$python" -m launch.task "$python" -m launch.job_command evaluate "$@"
