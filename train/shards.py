"""Which shards a stage reads; found before any heavy import, so that errors come at once."""

from dataclasses import dataclass

from data_tools.errors import ConfigError, DataError
from data_tools.stream.index import expand, same_shards
from train.config import Config, path_problems
from train.ranks import Ranks


@dataclass(frozen=True)
class Shards:
    """The shards of a stage, every pattern expanded."""

    train: list[list[str]]
    validation: list[str]

    @property
    def all(self) -> list[str]:
        """Every shard once."""
        return list(dict.fromkeys([s for part in self.train for s in part] + self.validation))


def find_shards(config: Config, ranks: Ranks) -> Shards:
    """Expand the shard patterns and check every other path of a stage.

    Raises:
        ConfigError: one message with all that a user must change, each with its key.
    """
    problems = path_problems(config)
    if ranks.world_size > config.data.packs_per_step:
        problems.append(
            f"data.packs_per_step = {config.data.packs_per_step} but there are {ranks.world_size} "
            "ranks: some would never have data. Use fewer ranks or more packs a step"
        )
    train = [
        _expand(f"data.train.{number}", [source.shards], problems)
        for number, source in enumerate(config.data.train)
    ]
    validation = _expand("data.validation", config.data.validation, problems)
    both = same_shards([shard for part in train for shard in part], validation)
    if both:
        problems.append(f"data.validation: {both[0]} is trained on as well; keep them apart")
    if problems:
        raise ConfigError("\n  ".join(problems))
    return Shards(train, validation)


def _expand(key: str, patterns: list[str], problems: list[str]) -> list[str]:
    try:
        return expand(patterns)
    except DataError as error:
        problems.append(f"{key}: {error}")
        return []
