"""MORE: a shared expert plus routed experts that turn a text feature into an expression vector.

See docs/clare.md, section 3.6. Each expert is one linear layer, and the router is a linear layer
with softmax, whose gates are not renormalized after the best experts were chosen.
"""

# Shapes: N texts, C text width, D vector dimension, E routed experts

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixtureOfRelationExperts(nn.Module):
    """`T = (1 - mix) * shared(t) + mix * sum over the top experts of gate_e * expert_e(t)`.

    Args:
        in_features: C.
        out_features: D.
        num_experts: E; 0 leaves only the shared expert (MORE off).
        top_k: experts used for each text.
        mix: weight of the routed part (lambda of the paper, 0.2).

    Raises:
        ValueError: `top_k` is not between 1 and `num_experts`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_experts: int, top_k: int, mix: float
    ) -> None:
        super().__init__()
        if num_experts and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={num_experts}, got {top_k}")
        self.num_experts, self.top_k, self.mix = num_experts, top_k, mix
        self.out_features = out_features
        self.shared = nn.Linear(in_features, out_features)
        if num_experts:
            self.router = nn.Linear(in_features, num_experts)
            # All experts as one layer, which is one product of matrices.
            self.experts = nn.Linear(in_features, num_experts * out_features)

    def forward(self, text_NC: Tensor) -> Tensor:
        """Return (N, D) expression vectors, not normalized."""
        unit_NC = nn.functional.normalize(text_NC, dim=-1)
        shared_ND: Tensor = self.shared(unit_NC)
        if not self.num_experts:
            return shared_ND
        gates_NE = self.router(unit_NC).softmax(-1)
        top = gates_NE.topk(self.top_k, dim=-1)
        # All experts are applied to all texts, and those not chosen get the gate 0: with a handful
        # of experts, this is faster than gathering the texts of each expert.
        gates_NE = torch.zeros_like(gates_NE).scatter(-1, top.indices, top.values)
        expert_NED = self.experts(unit_NC).unflatten(-1, (self.num_experts, -1))
        routed_ND = torch.einsum("ne,ned->nd", gates_NE, expert_NED)
        mixed: Tensor = (1 - self.mix) * shared_ND + self.mix * routed_ND
        return mixed
