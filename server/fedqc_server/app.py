"""The ServerApp: wiring only."""

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedqc.config import load_federation
from fedqc.errors import ConfigError
from fedqc_server import limits
from fedqc_server.phases import run_federation
from fedqc_server.run_folder import RunFolder
from fedqc_server.superlink import RUN_VARIABLE

# A plain assignment: Flower refuses an annotated one.
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Lead one run.

    `run_config`, or the environment variable `FEDQC_RUN` as JSON, names the federation.toml, the run's folder
    and the seed; `resume` (default False) goes on with a run in that folder, `phases` (default all) names the
    phases wanted, separated by commas.
    """
    limits.install()
    settings = {**context.run_config, **json.loads(os.environ.get(RUN_VARIABLE, "{}"))}
    missing = [key for key in ("federation", "out", "seed") if key not in settings]
    if missing:
        raise ConfigError(f"the run's configuration lacks {', '.join(missing)}; start the run with fedqc")
    config = load_federation(Path(str(settings["federation"])))
    phases = str(settings.get("phases", ""))
    run_federation(
        grid,
        config,
        RunFolder(Path(str(settings["out"])), resume=bool(settings.get("resume", False))),
        seed=int(settings["seed"]),
        only=phases.split(",") if phases else None,
    )
