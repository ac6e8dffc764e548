"""Annotation formats that users have, and which of them a path is in.

A further format is a module with `DESCRIPTION`, `sniff(path)` and `read(path)` (the protocol
`Format`), listed in `FORMATS`.
"""

from data_tools.errors import ConfigError
from data_tools.formats import guide, maestro
from data_tools.formats.document import Format, Rejection, SourceDocument
from data_tools.output import exists

__all__ = ["FORMATS", "Format", "Rejection", "SourceDocument", "detect"]

FORMATS: dict[str, Format] = {"guide": guide, "maestro": maestro}


def detect(path: str) -> str:
    """Return the name of the format that a path or URL is in.

    Raises:
        ConfigError: if the path does not exist, or no format or several fit it.
    """
    if not exists(path):
        raise ConfigError(f"{path}: no such file or folder")
    fitting = [name for name, format_ in FORMATS.items() if format_.sniff(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(
            f"{path}: fits several formats, {' and '.join(fitting)}; choose with --format NAME"
        )
    known = "; ".join(f"{name}: {format_.DESCRIPTION}" for name, format_ in FORMATS.items())
    raise ConfigError(
        f"{path}: in no annotation format that is known here. Known are {known}. "
        "Point at the annotation file itself, or convert it to the guide's JSON."
    )
