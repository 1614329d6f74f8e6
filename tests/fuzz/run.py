"""Fuzz `fedqc check` with atheris, which looks for inputs that reach code not reached before.

    python -m tests.fuzz.run [--seconds 300] [--target headers] [--out FOLDER]

The seconds are shared by all targets (`tests.fuzz.targets`), or given to the one that is named. What breaks a
promise stops its target and is printed; the input is left in the folder as `crash-...` and tried again with
`--input FILE`.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("headers", "bytes", "trees", "commands")
"""Of the targets."""
SEEDS = 64
"""Drawn inputs to begin with."""
LONGEST = 512
"""Bytes of an input: most folders are drawn from fewer than 100."""


def main() -> None:
    """Fuzz each target in a process of its own: the fuzzer never returns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--target", choices=NAMES)
    parser.add_argument("--input", type=Path, help="try this input, which a target left behind")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside or options.input:
        fuzz(options.target, options.seconds, options.out / options.target, options.input)
    targets = [options.target] if options.target else NAMES
    broken = []
    for target in targets:
        command = [sys.executable, "-m", "tests.fuzz.run", "--inside", "--target", target]
        command += ["--seconds", str(options.seconds // len(targets)), "--out", str(options.out)]
        if subprocess.run(command, check=False).returncode:
            broken.append(target)
    sys.exit(f"broken: {', '.join(broken)}; see {options.out}" if broken else 0)


def fuzz(target: str, seconds: int, out: Path, one: Path | None) -> None:
    """Fuzz one target, or try one input; this ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fedqc", "nibabel"]):
        from hypothesis import HealthCheck, settings

        from fedqc.cases.layouts import load_layouts
        from tests.fuzz.targets import TARGETS

        load_layouts()  # imports them
    quiet = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    tested: Any = quiet(TARGETS[target])
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        (corpus / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(LONGEST))  # noqa: S311
    arguments = [str(one)] if one else [f"-max_total_time={seconds}", str(corpus)]
    limits = [f"-max_len={LONGEST}", "-len_control=0", "-timeout=60", "-rss_limit_mb=3000"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-artifact_prefix={out}/", "-print_final_stats=1", *arguments],
        tested.hypothesis.fuzz_one_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
