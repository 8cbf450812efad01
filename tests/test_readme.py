"""The README's commands run and its table points at the right lines."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", README, re.M)


def test_table_names_the_line_of_each_function():
    named = re.findall(r"`(\w+)` (\w+\.py):(\d+)", README)
    assert len(named) >= 9
    for name, file, line in named:
        assert (ROOT / file).read_text().splitlines()[int(line) - 1].startswith(f"def {name}("), (name, file)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("pip", "pytest"))])
def test_command(command, tmp_path):
    """As written, but few steps into a temporary folder, and the demo model where a large one is named."""
    program, *args = command.split()
    if program == "deepspeed":
        assert sft.parse(args[1:]).preset == "gemma-2b"
        run = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", args[0]]
    else:
        run = [sys.executable, *args]
    if args[0] == "sft.py":
        run += ["--max-steps", "2", "--eval-samples", "8", "--output", str(tmp_path / "run")]
    done = subprocess.run([*run, "--cache-dir", str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = [line for line in done.stdout.splitlines() if line.startswith("{")][-1]
    assert json.loads(last)


def test_requirements_are_pinned_with_a_reason():
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all("#" in x for x in lines)
