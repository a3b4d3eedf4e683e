"""`reir serve`."""

from __future__ import annotations

import errno
import os
import queue
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli_common import (
    AsJson,
    Checkpoint,
    Encoder,
    Store,
    chosen_encoder,
    messages,
    opened,
    print_json,
)
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.store import InstanceStore
    from reir_serving.config import ServeConfig
    from reir_serving.supervisor import Server

EXAMPLES = """[bold]Examples[/bold]

reir serve --gallery photos

reir serve --host 0.0.0.0 --keys keys.yaml --replicas 2:4

reir serve --gallery photos --build serve.yaml

RAY_ADDRESS=auto reir serve --config serve-config.yaml"""

STOP = (signal.SIGINT, signal.SIGTERM)
IMPORT_PATH = "reir_serving.deployments:build_app"

Galleries = Annotated[
    list[str] | None,
    typer.Option("--gallery", help="Gallery to serve; several times for more; default: all."),
]
Host = Annotated[str | None, typer.Option(help="Address to serve on; others need --keys.")]
Port = Annotated[int | None, typer.Option(min=1, max=65_535, help="Port; 8000 unless told.")]
Keys = Annotated[
    Path | None, typer.Option(metavar="FILE", help="API keys that `reir keys new` wrote.")
]
Range = Annotated[
    str | None,
    typer.Option("--replicas", metavar="MIN:MAX", help="Replicas; Serve picks by load."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML of all settings; options here win."),
]
Build = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Only write the config file that Ray Serve and KubeRay run."),
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("serve", epilog=EXAMPLES)(serve)


def serve(  # noqa: PLR0913, every argument is an option of the command
    gallery: Galleries = None,
    store: Store = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    host: Host = None,
    port: Port = None,
    keys: Keys = None,
    replicas: Range = None,
    config: ConfigFile = None,
    build: Build = None,
    as_json: AsJson = False,
) -> None:
    """Answer searches over HTTP and on a web page, until Ctrl-C."""
    from reir.config import load_config
    from reir_serving.access import check_bind
    from reir_serving.config import ServeConfig

    given = {
        "galleries": gallery or None,
        "store": store,
        "encoder": chosen_encoder(checkpoint, encoder),
        "host": host,
        "port": port,
        "keys_file": keys,
    }
    values = load_config(ServeConfig, config).model_dump(mode="json", exclude_unset=True)
    told = values | {name: value for name, value in given.items() if value is not None}
    wanted = load_config(ServeConfig, told, _overrides(replicas))
    check_bind(wanted.host, wanted.keys_file)
    if build is not None:
        build.write_text(serve_file(wanted), encoding="utf-8")
        messages().print(f"wrote {build}; `serve run {build}`, or put it into a RayService")
        return
    _check(wanted)
    _serve(wanted, config, as_json=as_json)


def serve_file(config: ServeConfig) -> str:
    """Return the config file by which Ray Serve and KubeRay run this application, as YAML."""
    import yaml

    values = config.model_dump(mode="json", exclude_defaults=True) | {"store": config.store}
    application = {
        "name": "reir",
        "import_path": IMPORT_PATH,
        "route_prefix": "/",
        "args": values,
        "deployments": [{"name": "ingress", "user_config": config.live.model_dump(mode="json")}],
    }
    http = {"host": config.host, "port": config.port}
    return yaml.safe_dump({"http_options": http, "applications": [application]}, sort_keys=False)


def _check(config: ServeConfig) -> None:
    """Refuse what could not be served, before Ray starts.

    Raises:
        ConfigError: the port is taken.
        GalleryNotFound: a gallery is not there, or has no live version.
        SchemaMismatch: it was indexed with another checkpoint than the one given.
    """
    check_port(config.host, config.port)
    with opened(config.store) as store:
        for name in config.galleries or ():
            _check_gallery(store, name, config.encoder)


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be had.

    Raises:
        ConfigError: it is in use, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            advice = f"is taken; try --port {port + 1}" if taken else f"cannot be had: {error}"
            raise ConfigError(f"port {port} of {host} {advice}") from error


def _check_gallery(store: InstanceStore, name: str, encoder: str | None) -> None:
    from reir.encoders import load_encoder_spec
    from reir.retrieval import Retriever
    from reir.search import check_gallery

    check_gallery(store, name)
    store.live_version(name)  # says so when none is
    if encoder is not None:
        with messages().status("loading the model"):
            model = load_encoder_spec(encoder)
        Retriever(store, name, model.digest, model.dim)


def _serve(config: ServeConfig, file: Path | None, *, as_json: bool) -> None:
    """Serve until a signal says to stop; SIGHUP reloads the section `live` of the config file.

    Raises:
        ReirError: the server could not start, or exited unexpectedly.
        ModuleNotFoundError: the server needs a package that is not installed.
    """
    from reir_serving.environment import own_folder
    from reir_serving.supervisor import Report, Server, ready_address

    heard: queue.SimpleQueue[int | Report] = queue.SimpleQueue()
    for number in (*STOP, signal.SIGHUP):
        signal.signal(number, lambda number, _: heard.put(number))
    with own_folder() as folder, Server(config, folder, heard.put) as server:
        with messages().status("starting"):
            event = heard.get()
        if isinstance(event, int):
            return  # not ready yet, so there are no requests to finish
        address = ready_address(event)
        if as_json:
            print_json({"address": address, "pid": os.getpid()})
        else:
            typer.echo(f"ready: {address}  (Ctrl-C ends)")
        while (event := heard.get()) not in STOP:
            if event == signal.SIGHUP and file is not None:
                _reload(server, file)
            elif isinstance(event, Report):
                messages().print(event.said)
            else:  # SIGHUP without a config file: the terminal was closed
                break
        messages().print("stopping: finishing open requests")
        server.stop(config.drain_s)


def _reload(server: Server, file: Path) -> None:
    """Read the config file again and apply its section `live`."""
    from reir.config import load_config
    from reir_serving.config import ServeConfig

    try:
        server.change(load_config(ServeConfig, file).live)
    except ConfigError as error:  # the server keeps its settings
        messages().print(f"settings not reloaded: {error}")


def _overrides(replicas: str | None) -> list[str]:
    """Return the settings that "MIN:MAX" stands for; one number is both.

    Raises:
        ConfigError: it is neither.
    """
    if replicas is None:
        return []
    least, _, most = replicas.partition(":")
    if not least.isdecimal() or not (most or least).isdecimal():
        raise ConfigError(f"--replicas {replicas!r} must read MIN:MAX or a number, as in 1:4")
    both = (f"least={least}", f"most={most or least}")
    return [
        f"{part}.{each}" for part in ("ingress", "text", "retriever", "reranker") for each in both
    ]
