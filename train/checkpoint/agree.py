"""All ranks go on, or all ranks stop with the same message."""

import logging
from collections.abc import Callable
from typing import TypeVar

from data_tools.errors import CheckpointError
from train.collectives import gather_json

logger = logging.getLogger(__name__)

T = TypeVar("T")


def together(action: Callable[[], T], doing: str) -> T:
    """Run `action`, which holds no collective, on every rank; return this rank's result.

    Raises:
        CheckpointError: on every rank, naming the ranks on which `action` failed and why.
    """
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # handed on to every rank: one that stops alone leaves a hang
        logger.exception("%s failed", doing)
        problem = f"{type(error).__name__}: {error}"
    failed = [
        f"rank {r}: {text}" for r, text in enumerate(gather_json(problem)) if text is not None
    ]
    if failed:
        more = f" (and {len(failed) - 3} more ranks)" if len(failed) > 3 else ""
        raise CheckpointError(f"{doing} failed. {'; '.join(failed[:3])}{more}")
    return result  # type: ignore[return-value]
