"""`DelegatingEncoder`: the base of encoders that change what another encoder finds in photos."""

from __future__ import annotations

from collections.abc import Sequence

from reir.models.interfaces import InstanceEncoder, candidate_dims
from reir.records import FloatArray


class DelegatingEncoder:
    """Encodes expressions with another encoder, and gives its vectors as its own.

    Args:
        encoder: the other encoder.
    """

    def __init__(self, encoder: InstanceEncoder) -> None:
        self._encoder = encoder

    @property
    def dim(self) -> int:
        """Dimension D of both kinds of vector."""
        return self._encoder.dim

    @property
    def digest(self) -> str:
        """Sha256 of the weights of the other encoder, whose vectors these are."""
        return self._encoder.digest

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._encoder.num_candidates

    @property
    def candidate_dims(self) -> int:
        """See `CandidateEncoder.candidate_dims`."""
        return candidate_dims(self._encoder)

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        """(N, D) float32 unit vectors, in the order given."""
        return self._encoder.encode_expressions(expressions)
