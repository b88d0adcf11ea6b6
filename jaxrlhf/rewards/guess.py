"""An environment of text, as small as one can be: guess a number, and be told whether it is higher or lower."""

import re
from typing import Any

from jaxrlhf.rewards.turns import Turn


class Guess:
    """The record's ``number`` earns 1 once it is said; each other response is told where to look for it.

    Args:
        price: taken off for each guess that is wrong, and for a response without a number.
    """

    def __init__(self, price: float = 0.1):
        self.price = price

    def reset(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The number of each record."""
        return [{"number": int(record["number"])} for record in records]

    def step(self, states: list[dict[str, Any]], responses: list[str]) -> list[Turn]:
        """What is told of each guess, the last number of the response."""
        return [self.turn(state["number"], text) for state, text in zip(states, responses)]

    def turn(self, number: int, text: str) -> Turn:
        """What is told of one guess."""
        found = re.findall(r"\d+", text)
        if not found:
            return Turn("Say a number.", -self.price, False)
        if int(found[-1]) == number:
            return Turn(reward=1.0, done=True)
        return Turn("higher" if int(found[-1]) < number else "lower", -self.price, False)
