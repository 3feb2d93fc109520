"""Several teachers as one: the mean of their labels, and the labels of each."""

from __future__ import annotations

import numpy as np

from w2s_jax.teachers.neural import NeuralTeacher


class Ensemble:
    """The mean of neural teachers with the same dimensions; [B, T] → [B, D].

    Attributes:
        members: the teachers.
    """

    stand_in = False
    masks = True

    def __init__(self, name: str, members: tuple[NeuralTeacher, ...]) -> None:
        self.name, self.members = name, members
        self.dimensions = members[0].dimensions
        self.licence = "; ".join(member.licence for member in members)
        self.fingerprint = "+".join(member.fingerprint for member in members)
        self.doubt = "; ".join(member.doubt for member in members if member.doubt) or None
        self.parameters = sum(member.parameters for member in members)
        self.devices = members[0].devices

    def each(self, waves: np.ndarray, lengths: np.ndarray | None = None) -> list:
        """The labels of every member for float32 [B, T]: a list of [B, D]; see ``NeuralTeacher``."""
        return [member(waves, lengths) for member in self.members]

    def mean(self, each: list):
        """The labels of the ensemble, [B, D], from those of ``each``."""
        return sum(each) / len(each)

    def __call__(self, waves: np.ndarray, lengths: np.ndarray | None = None):
        return self.mean(self.each(waves, lengths))
