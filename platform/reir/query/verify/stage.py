"""The stage `verify` of an answer: which rows are compared with their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from reir.query.clock import Clock
from reir.query.pending import PendingAnswer, run_optional
from reir.query.stages import VERIFIED_HITS, Stages, VerifyRequest, VerifyResult


async def verify_hits(pending: Sequence[PendingAnswer], stages: Stages, clock: Clock) -> None:
    """Let the verifier compare the first rows with their pixels."""

    async def work(
        able: Sequence[PendingAnswer], timeout_s: float | None
    ) -> list[list[VerifyResult | None]]:
        rows = [one.retrieved.rows[:VERIFIED_HITS] for one in able]
        requests = [
            VerifyRequest(
                image_id=row.image_id, uri=row.uri, box=row.box, expression=one.query.expression
            )
            for one, of_one in zip(able, rows, strict=True)
            for row in of_one
        ]
        verified = iter(await stages.verify(requests, timeout_s))
        return [list(islice(verified, len(of_one))) for of_one in rows]

    for one, verified in await run_optional("verify", pending, stages, clock, work):
        one.verified = verified
