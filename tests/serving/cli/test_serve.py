"""`reir serve` until Ray would start: its settings, its checks, and the file that it writes."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from reir.checkpoint import load_encoder, save_checkpoint
from reir.config import load_config
from reir.errors import ConfigError, GalleryNotFound, SchemaMismatch
from reir.store import VersionSpec, open_store
from reir_serving.cli.serve import IMPORT_PATH, _check, check_port, check_search_log, register
from reir_serving.config import Replicas, ServeConfig
from reir_serving.ray import environment
from reir_testing.serving import draw_photo, free_port, index_photos
from reir_testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


@pytest.fixture
def location(tmp_path: Path) -> str:
    """An embedded store with a gallery `g` of the fake encoder."""
    store = open_store(str(tmp_path / "store"))
    index_photos(store, "g", [draw_photo(tmp_path / "photos", "green")])
    store.close()
    return str(tmp_path / "store")


def error_of(app: typer.Typer, *arguments: str) -> BaseException:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code != 0
    assert result.exception is not None, result.output
    return result.exception


def test_options_override_the_config_file(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\ningress: {target_ongoing_requests: 2}\nlive: {k: 5}\n")
    built = tmp_path / "built.yaml"
    options = ["--config", str(file), "--port", "9001", "--gallery", "a", "--gallery", "b"]
    options += ["--max-replicas", "3", "--store", "http://milvus:19530", "--build", str(built)]
    options += ["--search-log", "/logs", "--localizer", "piza:/adapters"]
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(built.read_text())
    assert written["http_options"] == {"host": "127.0.0.1", "port": 9001}
    (application,) = written["applications"]
    config = load_config(ServeConfig, application["args"])
    assert config.galleries == ("a", "b")
    assert config.zoomer == "piza:/adapters"
    assert (config.search_log, config.search_log_days) == (Path("/logs"), 30)
    assert config.store == "http://milvus:19530"
    assert config.ingress == Replicas(min_replicas=1, max_replicas=3, target_ongoing_requests=2)
    assert config.text == Replicas(min_replicas=1, max_replicas=3)
    (deployment,) = application["deployments"]
    assert deployment["name"] == "ingress"
    assert deployment["user_config"]["k"] == 5


def test_the_import_path_of_the_written_file_exists() -> None:
    module, _, name = IMPORT_PATH.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_max_replicas_must_not_be_less_than_min_replicas(app: typer.Typer, tmp_path: Path) -> None:
    error = error_of(app, "--min-replicas", "3", "--build", str(tmp_path / "x"))
    assert isinstance(error, ConfigError)
    assert "max_replicas (1) must be at least min_replicas (3)" in str(error)


def test_the_search_log_is_kept_for_a_hundred_years_at_most() -> None:
    assert load_config(ServeConfig, {"search_log_days": 36_500}).search_log_days == 36_500
    with pytest.raises(
        ConfigError, match=r"search_log_days.: got 36501; .* less than or equal to 36500"
    ):
        load_config(ServeConfig, {"search_log_days": 36_501})


def test_an_address_other_than_loopback_requires_keys(app: typer.Typer, location: str) -> None:
    error = error_of(app, "--host", "0.0.0.0", "--store", location)
    assert isinstance(error, ConfigError)
    assert "reir keys new" in str(error)


def test_a_port_in_use_is_an_error(app: typer.Typer, location: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(app, "--port", str(port), "--store", location)
    assert isinstance(error, ConfigError)
    assert f"port {port} of 127.0.0.1 is in use" in str(error)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on port 8000 of 192\.0\.2\.99: .*assign"):
        check_port("192.0.2.99", 8000)


def test_an_unknown_localizer_is_an_error(app: typer.Typer, location: str) -> None:
    options = ["--store", location, "--port", str(free_port())]
    error = error_of(app, *options, "--localizer", "grounding-dyno:x")
    assert isinstance(error, ConfigError)
    assert "unknown localizer 'grounding-dyno:x'" in str(error)


def test_a_search_log_that_cannot_be_written_is_an_error(
    app: typer.Typer, location: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    options = ["--store", location, "--port", str(free_port())]
    error = error_of(app, "--search-log", str(tmp_path / "file" / "searches"), *options)
    assert isinstance(error, ConfigError)
    assert f"cannot be written to {tmp_path}/file/searches: Not a directory" in str(error)
    check_search_log(tmp_path / "new" / "searches")
    assert (tmp_path / "new" / "searches").is_dir()


def test_the_error_for_an_unknown_gallery_suggests_a_name(app: typer.Typer, location: str) -> None:
    port = str(free_port())
    error = error_of(app, "--gallery", "gg", "--store", location, "--port", port)
    assert isinstance(error, GalleryNotFound)
    assert "did you mean 'g'?" in str(error)


def test_the_error_for_another_checkpoint_names_the_command_to_run(
    app: typer.Typer, location: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "tiny", tiny_model(), tiny_tokenizer(), {})
    options = ["--checkpoint", str(tmp_path / "tiny"), "--store", location]
    error = error_of(app, "--gallery", "g", *options, "--port", str(free_port()))
    assert isinstance(error, SchemaMismatch)
    assert "reir index SOURCE --gallery g" in str(error)


def test_the_pinned_version_is_the_one_that_must_have_the_checkpoint(
    location: str, tmp_path: Path
) -> None:
    digest = save_checkpoint(tmp_path / "tiny", tiny_model(), tiny_tokenizer(), {})
    dim = load_encoder(tmp_path / "tiny").dim
    with closing(open_store(location)) as store:
        store.create_version("g", "tiny", VersionSpec(dim=dim, digest=digest))
    values = {
        "store": location,
        "galleries": ("g",),
        "encoder": str(tmp_path / "tiny"),
        "port": free_port(),
    }
    _check(load_config(ServeConfig, {**values, "live": {"pinned": {"g": "tiny"}}}))
    for pinned in ({}, {"g": "v1"}):
        with pytest.raises(SchemaMismatch, match="version 'v1' of gallery 'g'"):
            _check(load_config(ServeConfig, {**values, "live": {"pinned": pinned}}))
    with pytest.raises(GalleryNotFound, match="has no version 'v9'"):
        _check(load_config(ServeConfig, {**values, "live": {"pinned": {"g": "v9"}}}))


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment.variables(Path("x")):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("clean_environment")
def test_each_server_has_its_own_files_and_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = environment.variables(tmp_path / "one"), environment.variables(tmp_path / "other")
    own = [name for name, value in one.items() if str(tmp_path) in value or name.endswith("_PORT")]
    own.append(environment.SECRET)
    assert {"RAY_SERVE_HAPROXY_SOCKET_PATH", "PROMETHEUS_MULTIPROC_DIR"} <= set(own)
    assert all(one[name] != other[name] for name in own)
    first, last = (f"RAY_SERVE_DIRECT_INGRESS_{each}_HTTP_PORT" for each in ("MIN", "MAX"))
    assert int(one[last]) <= int(other[first]) or int(other[last]) <= int(one[first])
    assert "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in own, "the fallback proxy needs its own port"
    (tmp_path / "one").mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    environment.apply(tmp_path / "one")
    assert os.environ["OMP_NUM_THREADS"] == "4", "a variable that is already set keeps its value"
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
