"""The application on Ray Serve: thin shells around `LocalParts` and `Service`.

    fused    one deployment, `ingress`: HTTP and all parts in each replica
    split    `ingress` for HTTP; `text`, `retriever`, `reranker` and `localiser` for the work

A call from one replica to another costs 3 to 9 ms on two slow cores, a whole search some 15
(docs/serve.md), so small machines fuse. Either way the same classes do the work.

`build_app` is what a Serve config file names: `reir_serving.deployments:build_app`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from reir.config import load_config
from reir.records import FloatArray, MaskRle
from reir.retrieval import Retrieved
from reir_serving.backend import Overloaded
from reir_serving.config import LiveSettings, Replicas, ServeConfig
from reir_serving.parts import LocalParts, Model, Wanted, open_parts
from reir_serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

APP, INGRESS = "reir", "ingress"
FUSED_BELOW_CPUS = 8
ASK_AGAIN = 2
"""A part whose replica died before it answered is asked again so often: no call changes anything
that doing it twice would spoil."""

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
SPARE_REQUESTS = 64
"""Requests beyond those of the API that a replica takes: health, metrics, the page."""

T = TypeVar("T")
logger = logging.getLogger(__name__)
