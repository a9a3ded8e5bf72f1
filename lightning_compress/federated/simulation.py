"""Flower's simulation engine on Ray: many clients on one machine, a task for each message."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning_compress.federated as federated
from lightning_compress.errors import require

__all__ = ["simulate"]


def simulate(
    client_app: Any,
    serve: Callable[[Any], Any],
    *,
    clients: int,
    cpus: int | None = None,
    cpus_each: int = 1,
    gpus_each: float = 0.0,
) -> Any:
    """Run a server's function against so many simulated clients.

    Args:
        client_app: of all clients.
        serve: called with Flower's grid in a thread; what it returns is returned.
        clients: how many.
        cpus: of the machine that Ray may use; None: all.
        cpus_each: of one client; so many clients at a time train as there are CPUs for.
        gpus_each: share of a GPU of one client.

    Raises:
        MissingExtraError: without Flower or Ray.
        BaseException: what `serve` raised.
    """
    os.environ.update({name: os.environ.get(name, off) for name, off in federated.QUIET.items()})
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    require("flwr", extra="federated")
    require("ray", extra="federated")
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    found: list[Any] = []
    failed: list[BaseException] = []
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:  # noqa: ARG001
        try:
            found.append(serve(grid))
        except BaseException as error:
            failed.append(error)
            raise

    count = os.cpu_count() or 1 if cpus is None else cpus
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's and Flower's own deprecations
        try:
            run_simulation(
                app,
                client_app,
                num_supernodes=clients,
                backend_config={
                    "init_args": {"num_cpus": count, "include_dashboard": False,
                                  "log_to_driver": False},
                    "client_resources": {"num_cpus": cpus_each, "num_gpus": gpus_each},
                },
            )  # fmt: skip
        except BaseException:
            if failed:
                raise failed[0] from None
            raise
    if failed:
        raise failed[0]
    return found[0]
