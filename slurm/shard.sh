#!/usr/bin/env bash
#SBATCH --job-name=lectern-shard
#SBATCH --output=logs/%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#
# Build shards from annotated documents, each task of the array its part; needs no GPU. Typed again
# it goes on with the shards that are missing. Options are those of data_tools.build.
#
#   sbatch --array=0-7 slurm/shard.sh                               # configs/pipeline.yaml: shard
#   sbatch --array=0-7 slurm/shard.sh my/pipeline.yaml shard.unit=line
#   sbatch --array=0-7 slurm/shard.sh data/invoices data/shards --shard-mb 500
#
# To be submitted from the clone. docs/slurm.md has the rest.
lib=${SLURM_SUBMIT_DIR:-.}/slurm/lib.sh
if [ ! -r "$lib" ]; then
  echo "there is no $lib: call sbatch in the clone, as \`sbatch slurm/shard.sh\`" >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
source "$lib"
prepare
[ $# -gt 0 ] || set -- configs/pipeline.yaml
exec "$python" -m launch.task "$python" -m launch.job_command shard "$@"
