"""Which shards a stage reads; found before any heavy import, so that errors come at once."""

from dataclasses import dataclass

from data_tools.errors import LaunchError
from data_tools.stream.index import expand
from train.config import Config
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
    """Expand the shard patterns; raise a LecternError for whatever a user got wrong."""
    if ranks.world_size > config.data.packs_per_step:
        raise LaunchError(
            f"{ranks.world_size} ranks but data.packs_per_step = {config.data.packs_per_step}: "
            "some ranks would never have data. Use fewer ranks or more packs a step"
        )
    return Shards(
        [expand([source.shards]) for source in config.data.train], expand(config.data.validation)
    )
