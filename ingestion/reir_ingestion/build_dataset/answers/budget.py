"""The budget of a dataset: number of requests and cost, over all runs that build it.

Each request and the tokens of each answer are appended to `requests.jsonl` in the work folder, so
that a run that continues an earlier one knows what is already spent.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir_ingestion.build_dataset.answers.failures import ModelUnavailable

REQUESTS = "requests.jsonl"


class BudgetSpent(ModelUnavailable):
    """No further request may be sent; a run with a higher limit continues."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a budget, and the prices.

    Attributes:
        max_requests: maximum number of requests, repetitions included; None for no limit.
        max_cost: no request is sent once this is spent, in the currency of the prices; None for
            no limit. Requests that are in progress at that moment are finished and paid.
        price_in, price_out: of 1,000 tokens of questions and of answers.
    """

    max_requests: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0


class Budget:
    """Counts requests and cost; many threads may use it.

    Args:
        limits: see `Limits`.
        work: the work folder.
    """

    def __init__(self, limits: Limits, work: Path) -> None:
        self._limits, self._path = limits, work / REQUESTS
        self._lock = threading.Lock()
        self.num_requests, self.tokens_in, self.tokens_out = 0, 0, 0
        self._reserved = 0
        for line in _lines(self._path):
            # A line is a request that was sent, or the tokens of an answer; see `_append`.
            self.num_requests += "sent" in line
            self.tokens_in += int(line.get("tokens_in", 0))
            self.tokens_out += int(line.get("tokens_out", 0))

    @property
    def cost(self) -> float:
        """What the answers cost so far."""
        limits = self._limits
        return (self.tokens_in * limits.price_in + self.tokens_out * limits.price_out) / 1000

    def take(self, key: str) -> None:
        """Count a request that is about to be sent.

        Raises:
            BudgetSpent: a limit is reached, so it must not be sent.
        """
        self.reserve()
        self.count(key)

    def reserve(self) -> None:
        """Set a request aside that will be counted or released later.

        Raises:
            BudgetSpent: a limit is reached, so it must not be sent.
        """
        limit = self._limits.max_requests
        with self._lock:
            # Requests that are set aside count as well: otherwise threads that check at the same
            # time would exceed the limit together.
            if limit is not None and self.num_requests + self._reserved >= limit:
                raise BudgetSpent(f"the budget of {limit} requests is used up")
            self.check_cost()
            self._reserved += 1

    def count(self, key: str) -> None:
        """Count a request that was set aside."""
        with self._lock:
            self._reserved -= 1
            self.num_requests += 1
            self._append({"sent": key})

    def release(self, number: int) -> None:
        """Give back requests that were set aside and are not sent."""
        with self._lock:
            self._reserved -= number

    def check_cost(self) -> None:
        """Check that the limit of the cost is not reached.

        Raises:
            BudgetSpent: it is.
        """
        limit = self._limits.max_cost
        if limit is not None and self.cost >= limit:
            raise BudgetSpent(f"the budget of {limit:g} is used up")

    def spend(self, tokens_in: int, tokens_out: int) -> None:
        """Count the tokens of a question and its answer."""
        with self._lock:
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            self._append({"tokens_in": tokens_in, "tokens_out": tokens_out})

    def _append(self, value: dict[str, Any]) -> None:
        # One write of a line at the end of the file, so that a killed process leaves whole lines.
        # The line break comes first: a power failure may have left a part of a line, without one.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, ("\n" + json.dumps(value)).encode())
        finally:
            os.close(descriptor)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # an empty line, or a part of one after a power failure
            continue
        if isinstance(value, dict):
            yield value
