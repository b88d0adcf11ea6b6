"""The table of algorithms. To add one: a file with an ALGORITHM, a row here, a YAML, a test file."""

from jaxrlhf import user_code
from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms import (
    bc,
    cm,
    distill,
    distill_data,
    dpo,
    fqi,
    grpo,
    ilql,
    kto,
    mc_returns,
    online_dpo,
    orpo,
    ppo,
    ppo_lagrangian,
    raft,
    rm,
    rm_ratings,
    rm_ties,
    sft,
    simpo,
)
from jaxrlhf.algorithms.validated import checked

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "rm": rm.ALGORITHM,
    "rm_ratings": rm_ratings.ALGORITHM,
    "rm_ties": rm_ties.ALGORITHM,
    "cm": cm.ALGORITHM,
    "ppo": ppo.ALGORITHM,
    "ppo_lagrangian": ppo_lagrangian.ALGORITHM,
    "grpo": grpo.ALGORITHM,
    "raft": raft.ALGORITHM,
    "dpo": dpo.ALGORITHM,
    "simpo": simpo.ALGORITHM,
    "orpo": orpo.ALGORITHM,
    "online_dpo": online_dpo.ALGORITHM,
    "kto": kto.ALGORITHM,
    "distill": distill.ALGORITHM,
    "distill_data": distill_data.ALGORITHM,
    "ilql": ilql.ALGORITHM,
    "fqi": fqi.ALGORITHM,
    "mc_returns": mc_returns.ALGORITHM,
    "bc": bc.ALGORITHM,
}


def find(name: str) -> Algorithm:
    """The record called ``name``: a row of ALGORITHMS, or ``package.module:NAME`` from outside the package, installed,
    in the working directory or beside the config.

    Raises KeyError for a name that is neither; ValueError, in one line, where there is no such Algorithm."""
    if ":" not in name:
        return ALGORITHMS[name]
    found = user_code.find(name)
    if not isinstance(found, Algorithm):
        what = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ValueError(f"{what}: expected an Algorithm of jaxrlhf.algorithm")
    return checked(name, found)
