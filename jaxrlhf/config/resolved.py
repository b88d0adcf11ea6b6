"""A config together with what its algorithm says of it: found once in a start, and passed on."""

import dataclasses

from jaxrlhf.algorithm import Algorithm, Updates
from jaxrlhf.config.adapters import bases_of
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import Roles, find_algorithm, roles_of
from jaxrlhf.data.batch_kinds import DATA_KINDS
from jaxrlhf.data.record_kinds import DataKind
from jaxrlhf.models.lora import Based
from jaxrlhf.types import Role


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config, its algorithm, and the answers of the algorithm's functions of the config.

    ``dataclasses.replace`` may give it a config that differs in what these do not depend on, as the run's length."""

    cfg: Config
    algorithm: Algorithm
    roles: Roles
    kinds: tuple[DataKind, ...]  # what the algorithm reads from data; rows and epochs of the first are counted
    updates: Updates  # of one iteration

    @property
    def bases(self) -> dict[Role, Based]:
        """The roles that share frozen weights."""
        return bases_of(self.cfg, self.roles)


def resolve_config(cfg: Config) -> Resolved:
    """Find the algorithm of a loaded config, and ask it once. Raises ConfigError where there is no such algorithm."""
    algorithm = find_algorithm(cfg.algorithm_name)
    kinds = tuple(DATA_KINDS[field] for field in algorithm.batch(cfg.algorithm))
    return Resolved(cfg, algorithm, roles_of(cfg, algorithm), kinds, algorithm.updates(cfg.algorithm))
