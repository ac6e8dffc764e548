#!/usr/bin/env bash
# Check this project on a GPU: `make gpu-check`, or benchmarks/gpu/check.sh [options of check.py].
# PYTHON names the interpreter; default: .venv/bin/python of the repository, else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

# Without a driver there is nothing to ask torch for, and perhaps no torch to ask.
if [[ $# -eq 0 ]] && ! command -v nvidia-smi >/dev/null 2>&1 && [[ ! -e /dev/nvidia0 ]]; then
  echo "no NVIDIA GPU: skipped"
  exit 0
fi
exec "$python" -m benchmarks.gpu.check "$@"
