"""Train a student on a teacher's labels.

``train`` runs a whole training, which can be killed at any point and resumed; ``train_step`` is the pure step of it.
"""

from w2s_jax.train.loop import Interrupted, train
from w2s_jax.train.run import planned_steps
from w2s_jax.train.step import State, initial_state, train_step, train_steps

__all__ = ["Interrupted", "State", "initial_state", "planned_steps", "train", "train_step", "train_steps"]
