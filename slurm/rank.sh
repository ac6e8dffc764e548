#!/usr/bin/env bash
# What each task of a step of ranks runs (launch/step.py): FOLDER COMMAND ARGUMENT ...
# Its step's id and its exit code are noted in FOLDER, because a step is signalled by its id, and
# srun returns the code of a rank that it killed itself. Signals are the command's.
folder=$1
shift
trap : TERM USR1 USR2
[ "${SLURM_PROCID:-0}" != 0 ] || echo "$SLURM_STEP_ID" >"$folder/step"
"$@"
code=$?
echo "$code" >>"$folder/codes"
exit "$code"
