"""Times networks on a machine that OpenSSH reaches; nothing of ours is installed there.

One `ssh` per measurement. Its standard input carries the supervisor (latency/supervisor.py), which
takes the machine's lock, then the files that it runs: the measuring loop of this host
(latency/runner.py) and the ONNX file. What is left there afterwards: the empty lock file.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import psutil

import latency
import space
from latency.config import SshConfig
from latency.device import LatencyMeter
from latency.fits import needed_bytes
from latency.host import check_memory
from latency.lock import device_lock
from latency.measurement import Measurement
from latency.pace import PaceHistory
from latency.processes import Finished, run_to_end
from latency.reports import DeviceFault, json_line, last_line, read_report
from latency.runs import (
    graph_versions,
    model_file,
    precision_identity,
    runner_settings,
    to_measurement,
)
from space.architecture import PAPER_STYLE, Architecture, NetworkStyle
from space.errors import MeasurementError
from space.records import to_plain

#: What runs on the device. A test sees to it that these need nothing else of ours.
SHIPPED = (
    "latency/__init__.py",
    "latency/host.py",
    "latency/runner.py",
    "latency/timing.py",
    "space/__init__.py",
    "space/errors.py",
)

#: For a board's Python to load ONNX Runtime and for the runner to stop by itself.
START_S = 20.0
#: For the files to arrive and the answer to come back, and the slowest line that is waited for.
TRANSFER_S = 30.0
BYTES_PER_S = 250_000

_TOO_OLD = "Python >= 3.8 is needed, but this is"

#: What latency.host.describe says, at the least.
_DESCRIBED = {
    "python", "executable", "processor", "machine", "cores", "governor", "memory_bytes",
    "free_bytes", "load_average", "temperature_c", "numpy", "onnxruntime", "providers", "problems",
}  # fmt: skip

#: Our options come first, and the first value that ssh finds for an option is the one it takes.
_OPTIONS = (
    "BatchMode=yes",  # no question is ever asked
    "StrictHostKeyChecking=yes",  # a machine whose key is not known is not talked to
    "NumberOfPasswordPrompts=0",
    "RequestTTY=no",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "PermitLocalCommand=no",
    "ControlMaster=no",  # none of our connections is to stay open for others
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "LogLevel=ERROR",
)

#: What ssh says -> how far it came, and the sentence.
_COMPLAINTS = (
    (
        r"IDENTIFICATION HAS CHANGED|host key .*has changed|key is known for|"
        r"Host key verification failed|differs from the key",
        "host key",
        "its host key is not the one in known_hosts; if the machine is the right one, put its key"
        " there",
    ),
    (
        r"Permission denied|Too many authentication failures|bad permissions|no such identity",
        "login",
        "it refused the login; ssh must get in with a key and without a password",
    ),
    (
        r"Connection refused|timed out|Could not resolve|No route to host|unreachable",
        "reachable",
        "it cannot be reached",
    ),
)


class SshMeter(LatencyMeter):
    """Times networks on a machine that OpenSSH reaches."""

    def __init__(self, config: SshConfig) -> None:
        self._config = config
        self._runtime: dict[str, str] | None = None

    def identity(self) -> dict[str, Any]:
        """See LatencyMeter; the machine is asked once, then its answer is kept.

        Who logs in, and with which key, is no part of it.
        """
        config = self._config
        return {
            "name": config.name,
            "kind": config.kind,
            "host": config.host,
            "provider": config.provider,
            **self._runtime_identity(),
            "threads": config.threads,
            "cores": None if config.cores is None else list(config.cores),
            **precision_identity(config),
            "batch": config.batch,
            "effort": config.effort,
        }

    def measure(
        self, architecture: Architecture, style: NetworkStyle = PAPER_STYLE
    ) -> Measurement:
        """See LatencyMeter."""
        config = self._config
        needed = needed_bytes(architecture, config.batch)
        memory = psutil.virtual_memory()
        check_memory(needed_bytes(architecture, 0), (memory.total, memory.available))
        device = self.identity()
        model = model_file(config, architecture, style)
        where, name = f"on {config.host}", f"ssh-{config.host}-{config.port or 22}"
        with device_lock(name, where, config.lock_timeout_s):
            # The first of the last `threads` cores is another one for each number of them.
            core = f"last{config.threads}" if config.cores is None else config.cores[0]
            history = PaceHistory(f"{name}-{core}-{config.python}")
            settings = runner_settings(
                config, architecture, needed_bytes=needed, known_pace_s=history.fastest_s()
            )
            report = self._report(
                "latency.runner",
                {"model.onnx": model, "settings.json": json.dumps(to_plain(settings)).encode()},
                lock_timeout_s=config.lock_timeout_s,
                time_limit_s=config.time_limit_s + START_S,
            )
            if report.get("runtime") != self._runtime_identity():
                raise MeasurementError(
                    f"{config.host} is another machine than before, or its software changed:"
                    f" {report.get('runtime')!r}; start again"
                )
            taken = to_measurement(
                report,
                architecture,
                style,
                device=device,
                model_bytes=len(model),
                environment=graph_versions(),
            )
            history.add(taken.environment.get("pace_s"))
            return taken

    def describe(self) -> dict[str, Any]:
        """Return what the machine says about itself; see latency.host.describe.

        Raises:
            DeviceFault: It does not answer.
        """
        found = self._report("latency.host", {}, lock_timeout_s=None, time_limit_s=60.0)
        missing = _DESCRIBED - found.keys()
        if missing:
            raise self._unreadable(f"it lacks {', '.join(sorted(missing))}")
        return found

    def _runtime_identity(self) -> dict[str, str]:
        if self._runtime is None:
            found = self.describe()
            problems = found.get("problems")
            if problems:
                name, problem = next(iter(problems.items()))
                raise DeviceFault(
                    f"{self._config.python} on {self._config.host} lacks {name} ({problem});"
                    f" install it there: {self._config.python} -m pip install numpy onnxruntime",
                    "python",
                )
            self._runtime = {
                "runtime": f"onnxruntime {found['onnxruntime']}",
                "processor": found["processor"],
                "machine": found["machine"],
            }
        return self._runtime

    # ------------------------------------------------------------------------ one order

    def _report(
        self,
        module: str,
        files: dict[str, bytes],
        *,
        lock_timeout_s: float | None,
        time_limit_s: float,
    ) -> dict[str, Any]:
        """The JSON object that a module of ours prints on the device, run with these files."""
        config = self._config
        sent = {**_shipped(), **files}
        transfer_s = TRANSFER_S + sum(map(len, sent.values())) / BYTES_PER_S
        order = {
            "module": module,
            "arguments": list(files),
            "files": [[name, len(content)] for name, content in sent.items()],
            "folder": config.folder,
            "lock_timeout_s": lock_timeout_s,
            "time_limit_s": time_limit_s,
            "transfer_s": transfer_s,
        }
        supervisor = _source("latency/supervisor.py")
        given = b"".join([supervisor, json.dumps(order).encode(), b"\n", *sent.values()])
        argv = ssh_command(config, len(supervisor))
        patience_s = config.connect_timeout_s + (lock_timeout_s or 0.0) + time_limit_s + transfer_s
        try:
            finished = run_to_end(argv, given=given, timeout_s=patience_s)
        except FileNotFoundError:
            raise DeviceFault(
                "this host has no `ssh`; install OpenSSH's client (Debian's openssh-client)", "ssh"
            ) from None
        return self._checked(self._answer(finished, patience_s))

    def _answer(self, finished: Finished, patience_s: float) -> dict[str, Any]:
        """The supervisor's answer."""
        config = self._config
        last_words = last_line(finished.errors)
        if finished.ending == "time":
            raise DeviceFault(
                f"{config.host} gave no answer within {patience_s:.3g} s and was given up",
                "answer",
            )
        if finished.ending == "output":
            raise self._unreadable("there was too much of it")
        if finished.status == 255:
            raise self._complaint(finished.errors)
        if finished.status in (126, 127):
            raise DeviceFault(
                f"{config.host} has no Python called {config.python!r} ({last_words}); set"
                " `python` to its absolute path there",
                "python",
            )
        if last_words.startswith(_TOO_OLD):
            raise DeviceFault(
                f"{config.host}: {last_words}; set `python` to a newer one there", "python"
            )
        answer = json_line(finished.output)
        if answer is None or not (
            isinstance(answer.get("status"), int) or isinstance(answer.get("fault"), str)
        ):
            said = last_words or last_line(finished.output)
            raise self._unreadable(f"exit status {finished.status}, {said!r}")
        return answer

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The module's report within a supervisor's answer."""
        config = self._config
        if "fault" in answer:
            kind, what = answer.get("kind"), answer["fault"]
            sentences = {
                "busy": f"another process has been measuring on {config.host} for"
                f" {config.lock_timeout_s:g} s ({what} is locked there); wait for it or raise"
                " lock_timeout_s",
                "full": f"the disk of {config.host} is full: {what}; make room there or set"
                " `folder`",
                "hang": f"the measurement on {config.host} hung and was killed after {what} s",
            }
            fallback = f"{config.host} cannot take the files: {what}; set `folder`"
            raise DeviceFault(sentences.get(str(kind), fallback), "answer")
        return read_report(
            f"on {config.host}",
            answer["status"],
            str(answer.get("output", "")),
            str(answer.get("errors", "")),
            time_limit_s=config.time_limit_s,
        )

    def _complaint(self, errors: str) -> DeviceFault:
        """What ssh itself has to say about a connection that failed."""
        last_words = last_line(errors)
        for pattern, stage, sentence in _COMPLAINTS:
            if re.search(pattern, errors, re.IGNORECASE):
                return DeviceFault(f"{self._config.host}: {sentence} ({last_words})", stage)
        said = f" ({last_words})" if last_words else ""
        return DeviceFault(
            f"the connection to {self._config.host} ended before an answer came{said}", "reachable"
        )

    def _unreadable(self, detail: str) -> DeviceFault:
        return DeviceFault(
            f"{self._config.host} gave an answer that cannot be read: {detail[:300]}", "answer"
        )


def ssh_command(config: SshConfig, supervisor_bytes: int) -> list[str]:
    """Return the arguments of `ssh` that execute the supervisor, sent first, on the device."""
    options = [*_OPTIONS, f"ConnectTimeout={max(1, round(config.connect_timeout_s))}"]
    if config.known_hosts is not None:
        options += [f'UserKnownHostsFile="{config.known_hosts}"', "GlobalKnownHostsFile=/dev/null"]
    if config.identity_file is not None:
        options.append("IdentitiesOnly=yes")
    argv = ["ssh", *(word for option in options for word in ("-o", option))]
    for flag, value in (
        ("-i", config.identity_file), ("-l", config.user), ("-p", config.port),
    ):  # fmt: skip
        if value is not None:
            argv += [flag, str(value)]
    program = (
        "import sys; v = sys.version_info[:2];"
        f" v < (3, 8) and sys.exit('{_TOO_OLD} %d.%d' % v);"
        # A file in the home folder must not stand in for a module of the standard library.
        " sys.path = [p for p in sys.path if p];"
        f" exec(sys.stdin.buffer.read({supervisor_bytes}).decode())"
    )
    # ssh joins its arguments with spaces and gives the line to the user's shell over there. So it
    # gets one line, in which every word is quoted; nothing of a network is in it, and of the
    # configuration the Python alone.
    line = " ".join(shlex.quote(word) for word in (config.python, "-c", program))
    return [*argv, "--", config.host, line]


@functools.cache
def _source(path: str) -> bytes:
    """A file of ours by its path in the repository."""
    room, name = path.split("/")
    module = {"latency": latency, "space": space}[room]
    assert module.__file__ is not None
    return (Path(module.__file__).parent / name).read_bytes()


def _shipped() -> dict[str, bytes]:
    return {path: _source(path) for path in SHIPPED}
