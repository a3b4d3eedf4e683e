"""A build that is killed while requests are in progress continues without asking twice."""

from __future__ import annotations

from pathlib import Path

from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.fake_endpoint import fake_endpoint
from reir_testing.data_engine.kills import build_with_kills


def test_a_killed_build_continues_without_asking_twice(tmp_path: Path) -> None:
    photos, out = draw_photos(tmp_path / "photos", num=16), tmp_path / "out"
    with fake_endpoint(delay_s=0.1) as endpoint:
        done = build_with_kills(photos, out, endpoint, num_kills=3)
    assert done.kills >= 2
    assert (done.repeated, done.unaccounted, done.written) == (0, 0, 16)
    # At most the requests that were in progress at each kill are asked again.
    assert done.lost <= 4 * done.kills
    assert len(set(endpoint.requests)) == 32
