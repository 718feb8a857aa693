"""The process of a `NullGpu`: answers its calls, each in a child and an empty folder of its own."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import IO, Any

# Of the project, what runs import anyway; app first, as it prepares the import of torch.
MODULES = (
    *("app", "app.__main__", "app.cli.train", "app.training.run", "app.planning.plan"),
    *("app.cli.infer", "app.inference.folder", "tests.gpu.probes"),
)


def serve() -> None:
    """Call what standard input names, `[function of probes.py, arguments, environment]` a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints shall not mix with the answers
    for module in MODULES:
        importlib.import_module(module)
    import torch

    assert not torch.cuda.is_initialized()  # or no child could use it
    for line in sys.stdin:
        name, arguments, variables = json.loads(line)
        function = getattr(sys.modules["tests.gpu.probes"], name)
        with (
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as value,
            tempfile.TemporaryDirectory() as folder,
        ):
            child = os.fork()
            if child == 0:
                os.chdir(folder)
                os.environ.update(variables)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os._exit(_answer(function, arguments, value))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            done = {"code": code, "value": _content(value) or "null", "output": _content(output)}
        print(json.dumps(done | {"value": json.loads(done["value"])}), file=answers, flush=True)


def _answer(function: Callable[..., Any], arguments: list[Any], value: IO[str]) -> int:
    """Return the exit code of a call."""
    code = 0
    try:
        json.dump(function(*arguments), value)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (value, sys.stdout, sys.stderr):
        stream.flush()
    return code


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    serve()
