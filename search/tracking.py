"""MLflow tracking of a search: parameters, curves and the report, on the user's own server.

    client = connect(uri)                                        before anything is created
    with MlflowTracking(watcher, client, folder, config) as watcher:
        run(campaign, parts, watcher)

The campaign is the record, and MLflow a copy of it: a server that goes away takes nothing from it.
MLflow is the [tracking] extra and imported only where it is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from search.campaign import open_to_read
from search.config import CampaignConfig, config_to_plain
from search.engine import CampaignWatcher, Relay
from search.trial import Trial
from space.errors import ConfigError
from space.files import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

#: In a campaign's folder: where its run is, so that a resumed campaign goes on with it.
RUN_FILE = "mlflow.json"
#: Figures gather so long before they are sent.
SEND_INTERVAL_S = 5.0
#: A server that did not answer is asked again so much later.
RETRY_INTERVAL_S = 60.0
#: What a server takes at once.
METRICS_AT_ONCE, PARAMS_AT_ONCE, VALUE_LENGTH = 1000, 100, 6000

#: A campaign waits for a server no longer than this; --json has standard output for itself; and
#: nobody is told of a campaign but the server that the user named.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def connect(uri: str | None) -> MlflowClient:
    """Return a client of a tracking server or store that answers.

    Args:
        uri: `http://host:5000`, `sqlite:///FILE.db` or another one that MLflow takes; None: its
            own default, MLFLOW_TRACKING_URI among it.

    Raises:
        ConfigError: The [tracking] extra is missing, or the server does not answer.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise ConfigError(
            "--mlflow: takes the package mlflow; call `pip install mnas[tracking]`, or leave"
            " --mlflow out."
        ) from None
    # It tells of every table that it makes in a new database.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        # Stores raise their own exceptions, down to those of a database's driver.
        where = uri or "MLflow's default"
        raise ConfigError(f"--mlflow: {where} cannot be used: {_first_line(error)}") from None
    return client


class MlflowTracking(Relay):
    """A watcher that logs what it is told to an MLflow run, and passes it on to another one.

    Use it as a context manager. The experiment is named after the campaign (or by
    MLFLOW_EXPERIMENT_NAME), the run after its folder. Parameters: the configuration, with dotted
    keys. Metrics: `trial/...` (reward, accuracy, latency_ms and other metrics) and `seconds/...`
    by trial id, `controller/...` by update; at the end `winner/...`, tags with the target and the
    reason of the end, and the files config.yaml and report.html.

    A server that does not answer is warned of once and asked again later; what it has missed by
    then is sent. If it is away at the end, the run stays open and `mnas resume` with the same
    server ends it.

    Args:
        watcher: Is told everything, too.
        client: See `connect`.
        folder: Of the campaign, which is made.
        config: Of the campaign.
    """

    def __init__(
        self,
        watcher: CampaignWatcher,
        client: MlflowClient,
        folder: Path,
        config: CampaignConfig,
    ) -> None:
        super().__init__(watcher)
        self._client = client
        self._folder = folder
        self._config = config
        self._run_id: str | None = None
        self._metrics: list[Metric] = []
        self._not_before = 0.0
        self._warned = False

    def __enter__(self) -> MlflowTracking:
        self._send()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._send(now=True)
        if self._run_id is None or self._metrics:
            return  # it was warned of
        status, reason = "FINISHED", None
        if kind is not None:
            status = "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
            reason = "interrupted" if status == "KILLED" else f"{kind.__name__}: {error}"
        try:
            self._end(self._run_id, status, reason)
        except Exception as problem:  # see _send
            self._warn(problem)

    def trial(self, trial: Trial) -> None:
        """Log a trial's figures; its id is their step."""
        super().trial(trial)
        figures = {"reward": trial.reward, "accuracy": trial.accuracy, **(trial.metrics or {})}
        self._log("trial", figures, trial.id)
        self._log("seconds", trial.timings or {}, trial.id)
        self._send()

    def update(self, batch: int, diagnostics: Mapping[str, float]) -> None:
        """Log a controller's diagnostics; the update's number is their step."""
        super().update(batch, diagnostics)
        self._log("controller", diagnostics, batch)
        self._send()

    def _log(self, group: str, figures: Mapping[str, float | None], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        for name, value in figures.items():
            if value is not None:
                self._metrics.append(Metric(_key(f"{group}/{name}"), float(value), now, step))

    def _send(self, *, now: bool = False) -> None:
        """Send what has gathered, if it is time to, or `now`."""
        if time.monotonic() < self._not_before and not now:
            return
        try:
            if self._run_id is None:
                self._run_id = self._begin()
            while self._metrics:
                self._client.log_batch(self._run_id, metrics=self._metrics[:METRICS_AT_ONCE])
                del self._metrics[:METRICS_AT_ONCE]
        except Exception as error:
            # Whatever a client, a network or a server raises: the campaign is worth more.
            self._warn(error)
        else:
            self._not_before = time.monotonic() + SEND_INTERVAL_S

    def _warn(self, error: Exception) -> None:
        self._not_before = time.monotonic() + RETRY_INTERVAL_S
        logger.warning("MLflow: %s", _first_line(error))
        if not self._warned:
            self._warned = True
            self._watcher.note(
                f"WARNING MLflow does not answer, the campaign goes on: {_first_line(error)}"
            )

    def _begin(self) -> str:
        """The id of this campaign's run: the one it had, or a new one with its parameters."""
        known = self._known_run()
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._config.name)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run_id: str = self._client.create_run(
            experiment,
            run_name=self._folder.resolve().name,
            tags={"mnas.campaign": str(self._folder)},
        ).info.run_id
        # At once, so that whatever fails next begins no second run.
        place = {"tracking_uri": self._client.tracking_uri, "run_id": run_id}
        write_atomically(self._folder / RUN_FILE, json.dumps(place).encode())
        self._log_parameters(run_id)
        return run_id

    def _known_run(self) -> str | None:
        """The run that an earlier process began there, if it is there still."""
        from mlflow.exceptions import MlflowException

        try:
            place = json.loads((self._folder / RUN_FILE).read_text())
        except (OSError, ValueError):
            return None
        if place["tracking_uri"] != self._client.tracking_uri:
            return None
        try:
            info = self._client.get_run(place["run_id"]).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(info.run_id) if info.lifecycle_stage == "active" else None

    def _log_parameters(self, run_id: str) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(_key(key), value[:VALUE_LENGTH])
            for key, value in flattened(config_to_plain(self._config))
        ]
        for start in range(0, len(parameters), PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=parameters[start : start + PARAMS_AT_ONCE])

    def _end(self, run_id: str, status: str, reason: str | None) -> None:
        with closing(open_to_read(self._folder)) as store:
            target_ms, winner = store.meta("target_ms"), store.meta("winner")
            reason = reason or store.meta("stop_reason")
        tags = {"target_ms": target_ms, "stop_reason": reason}
        for name, value in tags.items():
            if value is not None:
                self._client.set_tag(run_id, f"mnas.{name}", str(value))
        for name in ("validation_accuracy", "test_accuracy", "latency_ms"):
            if winner is not None and winner.get(name) is not None:
                self._client.log_metric(run_id, f"winner/{name}", winner[name])
        for file in ("config.yaml", "report.html"):
            if (self._folder / file).exists():
                self._client.log_artifact(run_id, str(self._folder / file))
        self._client.set_terminated(run_id, status)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as JSON or bare text) of nested plain values; lists are values."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from flattened(value, name)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    """A name in the letters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
