"""What watching has cost so far, and whether one more observation fits the budget."""

from __future__ import annotations

import math
import time


class Clock:
    """Wall time since it was made, split into watching and training; seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._training_before = 0.0
        self.watching = 0.0
        self.last_observation = 0.0

    @property
    def training(self) -> float:
        """Seconds that were not spent watching."""
        return time.monotonic() - self._started - self.watching

    @property
    def overhead(self) -> float:
        """Seconds watching / seconds training so far; NaN before the clock has seen any training."""
        return self.watching / self.training if self.training > 0 else math.nan

    def record(self, seconds: float) -> float:
        """Count an observation that took `seconds`; return the seconds of training since the one before it."""
        self.watching += seconds
        self.last_observation = seconds
        training = self.training
        since, self._training_before = training - self._training_before, training
        return max(since, 0.0)

    def add(self, seconds: float) -> None:
        """Count watching that is no observation, such as explaining a step."""
        self.watching += seconds

    def fits(self, max_overhead: float | None) -> bool:
        """Tell whether one more observation, as long as the last, keeps watching within `max_overhead` of training."""
        return max_overhead is None or self.watching + self.last_observation <= max_overhead * self.training
