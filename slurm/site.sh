# shellcheck shell=bash
# What is particular to a site; the only file of slurm/ to edit. It may also be missing.
# The jobs read it themselves. Before submitting, read it into the shell as well, because sbatch
# looks for account, partition and GPUs before a job starts:
#
#   source slurm/site.sh && sbatch slurm/stage1.sh
#
# What is given on sbatch's command line wins over what stands here.

# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8

# module purge && module load cuda/12.8
# export LECTERN_PYTHON=/opt/envs/lectern/bin/python

# export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export TRITON_CACHE_DIR=/local/$USER/triton
