"""Rate limits: a token bucket for each key.

The time is an argument of each call, so that tests need no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """Admits `burst` requests at once, and `rate_per_s` requests a second in the long run."""

    rate_per_s: float
    burst: int
    tokens: float = field(init=False)
    updated_s: float = 0.0

    def __post_init__(self) -> None:
        """Start with a full bucket."""
        self.tokens = float(self.burst)

    def take(self, now_s: float) -> float:
        """Take a token and return 0.0, or return the seconds until there is one to take."""
        elapsed_s = now_s - self.updated_s
        self.tokens = min(self.burst, self.tokens + elapsed_s * self.rate_per_s)
        self.updated_s = now_s
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.rate_per_s


class RateLimit:
    """The buckets of one process. With n replicas, a key gets up to n times its rate."""

    def __init__(self, rate_per_s: float | None, burst: int) -> None:
        """Set the rate of keys without a rate of their own; None does not limit them."""
        self._rate_per_s, self._burst = rate_per_s, burst
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, key_id: str, own_rate_per_s: float | None, now_s: float) -> float:
        """Return 0.0 if the key may send a request now, or else the seconds to wait."""
        rate_per_s = own_rate_per_s or self._rate_per_s
        if rate_per_s is None:
            return 0.0
        bucket = self._buckets.get(key_id)
        # The rate differs if the keys file has changed since the last request.
        if bucket is None or bucket.rate_per_s != rate_per_s:
            bucket = self._buckets[key_id] = TokenBucket(rate_per_s, self._burst)
            bucket.updated_s = now_s  # a new bucket is full, and is refilled from now on
        return bucket.take(now_s)
