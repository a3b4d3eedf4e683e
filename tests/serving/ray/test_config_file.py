"""Ray Serve builds the application from the config file that `reir serve --build` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from reir.errors import ConfigError
from reir_serving.cli.serve import serve_file
from reir_serving.config import Replicas, ServeConfig
from reir_serving.ray.deployments import build_app


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_the_application_is_built_from_the_arguments_in_the_file(
    layout: str, tmp_path: Path
) -> None:
    config = ServeConfig(
        store=str(tmp_path), layout=layout, ingress=Replicas(min_replicas=2, max_replicas=2)
    )
    (application,) = yaml.safe_load(serve_file(config))["applications"]
    built = call_user_app_builder_with_args_if_necessary(build_app, application["args"])
    assert built._bound_deployment.num_replicas == 2


def test_wrong_arguments_in_the_file_are_named() -> None:
    with pytest.raises(ConfigError, match="min_replica"):
        call_user_app_builder_with_args_if_necessary(build_app, {"ingress": {"min_replica": 2}})
