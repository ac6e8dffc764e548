# shellcheck shell=bash
# What is particular to a site; the only file of slurm/ to edit. It may also be missing.
# Jobs and launch.pipeline read it themselves. Before calling sbatch by hand, read it into the shell
# as well, because sbatch looks for account, partition and GPUs before a job starts:
#
#   . slurm/site.sh && sbatch slurm/stage1.sh
#
# What is given on sbatch's command line, or under `sbatch:` in a pipeline, wins over what is here.

# --- who and where: sbatch reads these by itself
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_CONSTRAINT=h100

# --- software: modules and a virtual environment elsewhere than .venv ...
# module purge && module load cuda/12.8
# export LECTERN_PYTHON=/opt/envs/lectern/bin/python

# --- ... or a container (containers/Dockerfile): pyxis takes an image, apptainer a file
# export LECTERN_CONTAINER=/images/lectern.sqsh
# export LECTERN_APPTAINER=/images/lectern.sif
# export LECTERN_CONTAINER_PYTHON=/opt/env/bin/python
# export LECTERN_CONTAINER_MOUNTS=/data:/data,/models:/models # the clone is mounted already

# --- network and caches: a wrong interface is worse than none
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# export TRITON_CACHE_DIR=/local/$USER/triton TORCH_EXTENSIONS_DIR=/local/$USER/torch

# --- without GPUs, or to leave them alone
# export DS_ACCELERATOR=cpu OMP_NUM_THREADS=4 # threads a rank

# --- what a stage's job does
# export LECTERN_PREFLIGHT=off  # no look at the nodes before training
# export LECTERN_PREFLIGHT_S=60 # it may take so long
# export LECTERN_MAX_FAILURES=3 # starts in a row without a newer checkpoint end a job
# export LECTERN_MIN_NODES=4    # with spare nodes: train without those that the preflight finds bad
