"""A call in a process of its own: for functions that import torch or timm, which their caller need not wait for or keep in memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_MARK = "RESPONSE"  # libraries may print lines of their own


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a module's `function` returns for the arguments, all JSON values (tuples become lists); None where the process fails."""
    script = (
        f"import json, sys; from {function.__module__} import {function.__name__} as function; "
        f"print('{_MARK}' + json.dumps(function(*json.load(sys.stdin))))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        input=json.dumps(arguments),  # longer than an argument of a process may be
        capture_output=True,
        text=True,
        check=False,
    )
    response = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    return json.loads(response.removeprefix(_MARK)) if response else None
