"""Checkpoint -> weight files, in a process of its own whose memory is watched from outside.

python -m benchmarks.checkpointing.converters ours|theirs|idle FOLDER OUT
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Import, say "ready", convert, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["ours", "theirs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if options.kind == "ours":
        from train.checkpoint.hub import check_weights, write_weights
        from train.checkpoint.weights import Origin, TrainedWeights

        def convert() -> None:
            origin = Origin((options.folder / "ours" / "step-00000001",))
            digests = write_weights(options.out, origin, torch.float32, 5 * 10**9)
            check_weights(options.out, TrainedWeights(origin).shapes(), torch.float32, digests)
    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        def convert() -> None:
            convert_zero_checkpoint_to_fp32_state_dict(
                str(options.folder / "theirs"),
                str(options.out),
                tag="step",
                safe_serialization=True,
            )

    options.out.mkdir(parents=True, exist_ok=True)
    print("ready", flush=True)
    time.sleep(0.3)  # the watcher takes the memory of an idle process
    start = time.perf_counter()
    convert()
    print(f"seconds {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    main()
