"""Rate limits: a token bucket for each key, a pure function of time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """Lets `burst` requests pass at once, and `rate_per_s` a second in the long run."""

    rate_per_s: float
    burst: int
    left: float = field(init=False)
    filled_s: float = 0.0

    def __post_init__(self) -> None:
        """Start full."""
        self.left = float(self.burst)

    def take(self, now_s: float) -> float:
        """Take a token: 0.0 where there was one, else the seconds until there will be."""
        self.left = min(self.burst, self.left + (now_s - self.filled_s) * self.rate_per_s)
        self.filled_s = now_s
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.rate_per_s


class RateLimit:
    """One bucket a key, in this process: with n replicas a key gets up to n times its rate."""

    def __init__(self, rate_per_s: float | None, burst: int) -> None:
        """Limit keys that have no rate of their own to `rate_per_s`; None lets them pass."""
        self._rate_per_s, self._burst = rate_per_s, burst
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, key_id: str, own_rate_per_s: float | None, now_s: float) -> float:
        """Return 0.0 where the key may go on, else the seconds to wait."""
        rate_per_s = own_rate_per_s or self._rate_per_s
        if rate_per_s is None:
            return 0.0
        bucket = self._buckets.get(key_id)
        if bucket is None or bucket.rate_per_s != rate_per_s:
            bucket = self._buckets[key_id] = TokenBucket(rate_per_s, self._burst)
            bucket.filled_s = now_s
        return bucket.take(now_s)
