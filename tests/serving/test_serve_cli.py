"""`reir serve` up to where Ray would start: what it reads, what it refuses, what it writes."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from reir.checkpoint import save_checkpoint
from reir.config import load_config
from reir.errors import ConfigError, GalleryNotFound, SchemaMismatch
from reir.store import open_store
from reir.testing.tiny import tiny_model, tiny_tokenizer
from reir_serving import environment
from reir_serving.cli import IMPORT_PATH, check_port, register
from reir_serving.config import Replicas, ServeConfig
from reir_serving.testing import draw, put


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
    put(store, "g", [draw(tmp_path / "photos", "green")])
    store.close()
    return str(tmp_path / "store")


def refusal(app: typer.Typer, *arguments: str) -> BaseException:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code != 0
    assert result.exception is not None, result.output
    return result.exception


def test_options_win_over_the_file(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\ningress: {target_ongoing: 2}\nlive: {k: 5}\n")
    built = tmp_path / "built.yaml"
    options = ["--config", str(file), "--port", "9001", "--gallery", "a", "--gallery", "b"]
    options += ["--replicas", "1:3", "--store", "http://milvus:19530", "--build", str(built)]
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(built.read_text())
    assert written["http_options"] == {"host": "127.0.0.1", "port": 9001}
    (application,) = written["applications"]
    config = load_config(ServeConfig, application["args"])
    assert config.galleries == ("a", "b")
    assert config.store == "http://milvus:19530"
    assert config.ingress == Replicas(least=1, most=3, target_ongoing=2)
    assert config.text == Replicas(least=1, most=3)
    (deployment,) = application["deployments"]
    assert deployment["name"] == "ingress"
    assert deployment["user_config"]["k"] == 5


def test_what_the_built_file_names_is_there() -> None:
    module, _, name = IMPORT_PATH.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("text", ["x", ":2", "1:2:3", "-1"])
def test_wrong_numbers_of_replicas_are_refused(app: typer.Typer, text: str, tmp_path: Path) -> None:
    error = refusal(app, f"--replicas={text}", "--build", str(tmp_path / "x"))
    assert isinstance(error, ConfigError)
    assert repr(text) in str(error)


def test_fewer_replicas_at_most_than_at_least_are_refused(app: typer.Typer, tmp_path: Path) -> None:
    error = refusal(app, "--replicas", "3:1", "--build", str(tmp_path / "x"))
    assert "most (1) must be at least least (3)" in str(error)


def test_other_addresses_need_keys(app: typer.Typer, location: str) -> None:
    error = refusal(app, "--host", "0.0.0.0", "--store", location)
    assert isinstance(error, ConfigError)
    assert "reir keys new" in str(error)


def test_a_taken_port_is_named(app: typer.Typer, location: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(app, "--port", str(port), "--store", location)
    assert isinstance(error, ConfigError)
    assert f"port {port} of 127.0.0.1 is taken; try --port {port + 1}" in str(error)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be had: .*assign"):
        check_port("192.0.2.99", 8000)


def test_an_unknown_gallery_is_refused_with_its_nearest_name(
    app: typer.Typer, location: str
) -> None:
    port = str(environment.free_port())
    error = refusal(app, "--gallery", "gg", "--store", location, "--port", port)
    assert isinstance(error, GalleryNotFound)
    assert "did you mean 'g'?" in str(error)


def test_another_checkpoint_is_refused_with_the_command_that_mends_it(
    app: typer.Typer, location: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "tiny", tiny_model(), tiny_tokenizer(), {})
    options = ["--checkpoint", str(tmp_path / "tiny"), "--store", location]
    error = refusal(app, "--gallery", "g", *options, "--port", str(environment.free_port()))
    assert isinstance(error, SchemaMismatch)
    assert "reir index SOURCE --gallery g" in str(error)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment.settings(Path("x")):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("clean_environment")
def test_each_server_has_files_and_ports_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = environment.settings(tmp_path / "one"), environment.settings(tmp_path / "other")
    own = [name for name, value in one.items() if str(tmp_path) in value or name.endswith("_PORT")]
    own.append(environment.MARK)
    assert {"RAY_SERVE_HAPROXY_SOCKET_PATH", "PROMETHEUS_MULTIPROC_DIR"} <= set(own)
    assert all(one[name] != other[name] for name in own)
    least, most = (f"RAY_SERVE_DIRECT_INGRESS_{each}_HTTP_PORT" for each in ("MIN", "MAX"))
    assert int(one[most]) <= int(other[least]) or int(other[most]) <= int(one[least])
    assert "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in own, "the fallback proxy needs its own port"
    (tmp_path / "one").mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    environment.apply(tmp_path / "one")
    assert os.environ["OMP_NUM_THREADS"] == "4", "what is set stays"
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
