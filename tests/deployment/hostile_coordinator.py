"""The ServerApp of a coordinator that asks for what it should not get.

It lies in a package `fedqc_server` of its own, before the real one on the path. The environment variable
FEDQC_RUN holds a JSON object: `out`, the file for the answers, and `requests`, each a message type and its
records: a body of JSON, and whether weights come along.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedqc.protocol import PROTOCOL_VERSION

app = ServerApp()
SECONDS = 90.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask one site everything, and write down what comes back."""
    told = json.loads(os.environ["FEDQC_RUN"])
    end = time.monotonic() + SECONDS
    while not (nodes := list(grid.get_node_ids())):
        assert time.monotonic() < end, "nobody came"
        time.sleep(1)
    answers: list[dict[str, Any]] = []
    for request in told["requests"]:
        body = json.dumps(request.get("body", {}))
        content = RecordDict({"request": ConfigRecord({"version": PROTOCOL_VERSION, "body": body})})
        if "numbers" in request:
            content["weights"] = ArrayRecord({"w": Array(np.zeros(request["numbers"], np.float32))})
        message = Message(content, nodes[0], request["type"], ttl=SECONDS)
        for reply in grid.send_and_receive([message], timeout=SECONDS):
            failed = reply.error if reply.has_error() else None
            answers.append(
                {
                    "asked": request["name"],
                    "error": None if failed is None else [failed.code, failed.reason],
                    "records": {} if failed is not None else {k: dict(v) for k, v in reply.content.items()},
                }
            )
    Path(told["out"]).write_text(json.dumps(answers, default=str))
