"""Replicas are killed while users give feedback: is all of it recorded, and each once?

    python benchmarks/feedback_kills.py

`reir serve` runs with two replicas that share one search log. Several clients send feedback of all
verdicts, each with its own expression. Whenever some more feedback is acknowledged, SIGKILL ends a
randomly chosen replica, even if it is the last one. A client that gets no answer sends the same
feedback again with the same idempotency key, as `reir.Client` does; and some feedback whose answer
did arrive is sent once more. At the end, what the clients sent is compared with what is in the
database.

    feedback.missing       feedback that was answered with `recorded: true`, but is not there
    feedback.duplicates    feedback that is there more than once
    feedback.wrong         feedback that is there with another verdict, photo or box
    feedback.kills         replicas killed
    feedback.acknowledged  feedback that was answered with `recorded: true`
    feedback.unanswered    feedback without an answer at the end of the client's patience
    feedback.retries       attempts after one without an answer, or with a busy server
    feedback.repeated      feedback that was sent once more after its answer
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _indexing import parser_of
from _report import write_report
from _served import GALLERY, Server, add_arguments, fill_gallery, served

import reir
from reir.errors import ServerError
from reir.operations.feedback import Verdict, read_feedback
from reir.operations.feedback.records import new_key
from reir.records import Box
from reir_testing.serving import free_port

REPLICAS, CLIENTS = 2, 4
BETWEEN_KILLS = (10, 60)
"""Range of the number of acknowledged feedback from one kill to the next."""

LAST_S = 3.0
PATIENCE_S = 120.0
REPEATED_SHARE = 0.1
MAX_MINUTES = 9.0
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "absent", "box")


@dataclass(frozen=True)
class Sent:
    """Feedback that a client sent, as far as it can be compared."""

    verdict: Verdict
    image_id: str
    instance_id: str
    box: Box | None


@dataclass
class User:
    """A client in a thread of its own.

    Attributes:
        acknowledged, unanswered: expression -> feedback.
        retries, repeated: see the figures.
    """

    number: int
    url: str
    image_ids: list[str]
    acknowledged: dict[str, Sent] = field(default_factory=dict)
    unanswered: dict[str, Sent] = field(default_factory=dict)
    retries: int = 0
    repeated: int = 0

    def run(self, stop: threading.Event) -> None:
        """Give feedback until the end."""
        rng = random.Random(self.number)
        with reir.Client(self.url, patience_s=PATIENCE_S, sleep=self._wait) as client:
            while not stop.is_set():
                self._give(client, rng)

    def _give(self, client: reir.Client, rng: random.Random) -> None:
        number = len(self.acknowledged) + len(self.unanswered)
        expression = f"the mug of user {self.number} with number {number}"
        said = self._choose(rng)
        key = new_key()
        try:
            # `recorded: false` would count as missing, since nothing here keeps the disk from it.
            self._send(client, expression, said, key)
            self.acknowledged[expression] = said
            if rng.random() < REPEATED_SHARE:
                self.repeated += 1
                self._send(client, expression, said, key)
        except ServerError:
            if expression not in self.acknowledged:
                self.unanswered[expression] = said

    def _choose(self, rng: random.Random) -> Sent:
        verdict, image_id = rng.choice(VERDICTS), rng.choice(self.image_ids)
        if verdict == "absent":
            return Sent(verdict, "", "", None)
        if verdict == "box":
            return Sent(verdict, image_id, "", (0.1, 0.2, round(rng.uniform(0.3, 0.9), 3), 0.8))
        return Sent(verdict, image_id, f"{image_id}#0", None)

    def _send(self, client: reir.Client, expression: str, said: Sent, key: str) -> None:
        client.feedback(
            GALLERY,
            expression,
            said.verdict,
            said.instance_id,
            image_id=said.image_id if said.verdict == "box" else "",
            box=said.box,
            idempotency_key=key,
        )

    def _wait(self, seconds: float) -> None:
        self.retries += 1
        time.sleep(seconds)


def main() -> None:
    """Measure, print and save the figures."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--kills", type=int, default=20)
    parser.set_defaults(instances=2_000, photos=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = kill_replicas(arguments, Path(name))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(f"figures in {write_report('feedback_kills', figures).name}")


def kill_replicas(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill replicas while clients give feedback, and return the figures."""
    store = fill_gallery(arguments, folder)
    log = folder / "searches"
    options = {
        "ingress": {"min_replicas": REPLICAS, "max_replicas": REPLICAS},
        "search_log": str(log),
        "limits": {"feedback_rate_per_s": None},
    }
    with served(store, folder, free_port(), options) as server:
        photos = server.get(f"/v1/galleries/{GALLERY}/images?limit=12")["images"]
        image_ids = [each["image_id"] for each in photos]
        users = [User(number, server.url, image_ids) for number in range(CLIENTS)]
        stop = threading.Event()
        threads = [threading.Thread(target=user.run, args=(stop,)) for user in users]
        for thread in threads:
            thread.start()
        kills = _kill(server, users, arguments.kills)
        time.sleep(LAST_S)
        stop.set()
        for thread in threads:
            thread.join()
    return {"feedback.kills": kills, **compare(users, log)}


def _kill(server: Server, users: list[User], number: int) -> int:
    """Kill replicas, and return how many."""
    rng, kills, wanted = random.Random(0), 0, 0
    until_s = time.monotonic() + 60 * MAX_MINUTES
    while kills < number and time.monotonic() < until_s:
        time.sleep(0.02)
        acknowledged = sum(len(user.acknowledged) for user in users)
        if acknowledged >= wanted and (alive := server.replicas()):
            os.kill(rng.choice(alive), signal.SIGKILL)
            kills += 1
            wanted = acknowledged + rng.randint(*BETWEEN_KILLS)
            print(f"{kills} kills, {len(alive)} replicas, {acknowledged} acknowledged", flush=True)
    return kills


def compare(users: list[User], log: Path) -> dict[str, Any]:
    """Compare what was sent with what is recorded."""
    acknowledged = {text: said for user in users for text, said in user.acknowledged.items()}
    sent = acknowledged | {text: said for user in users for text, said in user.unanswered.items()}
    recorded = read_feedback(log, GALLERY)
    times = Counter(each.expression for each in recorded)
    wrong = sum(each.expression not in sent for each in recorded)
    for each in recorded:
        if said := sent.get(each.expression):
            box = each.box if each.verdict == "box" else None
            wrong += Sent(each.verdict, each.image_id, each.instance_id, box) != said
    return {
        "feedback.missing": sum(text not in times for text in acknowledged),
        "feedback.duplicates": sum(number - 1 for number in times.values()),
        "feedback.wrong": wrong,
        "feedback.acknowledged": len(acknowledged),
        "feedback.unanswered": len(sent) - len(acknowledged),
        "feedback.retries": sum(user.retries for user in users),
        "feedback.repeated": sum(user.repeated for user in users),
    }


if __name__ == "__main__":
    main()
