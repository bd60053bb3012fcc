"""The soak, for a minute of everything at once; its last line says what was wrong."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 60


def test_nothing_leaks_hangs_or_differs_under_everything_at_once(tmp_path: Path) -> None:
    plot = tmp_path / "soak.svg"
    command = [sys.executable, "-m", "benchmarks.soak", f"--seconds={SECONDS}", f"--out={plot}"]
    run = subprocess.run(
        [*command, "--clients=16"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 wrong" in run.stdout
    assert plot.read_text().endswith("</svg>\n")
