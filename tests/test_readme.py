"""The README's commands and snippets run, and its tables name what exists."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
LINES = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", README, flags=re.S), re.M)
COMMANDS = [line for line in LINES if not line.startswith(("pip", "pytest", "{"))]
CHAIN = next(line for line in LINES if "&& python sft.py" in line)
# How a command becomes small enough for a test. Flags of the command itself come later and win.
SMALL = {
    "sft.py": "--preset demo --data demo:test --eval-data demo:test=0.1 --max-steps 20",
    "dpo.py": "--preset demo --model runs/sft --data demo-pairs:test --max-steps 2 --max-pairs 32 "
              "--eval-data demo-pairs:test=0.1",
    "online_dpo.py": "--preset demo --model runs/dpo --data demo:test --eval-data demo-pairs:test=0.1 "
                     "--max-steps 2 --max-prompts 16 --iterations 1 "
                     "--max-new-tokens 8 --truncated-can-win --judge python:length.py:score",
    "evaluate.py": "stages --data demo:test=0.1 --pairs demo-pairs:test=0.1 --max-new-tokens 8"}
LARGE = {"google/gemma-2b": "demo", "runs/gemma-2b-sft": "runs/sft", "runs/gemma-2b-dpo": "runs/dpo"}


def run(command, folder, output=None):
    """A shell line of the README in `folder`, its scripts made small; stdout."""
    for large, small in LARGE.items():
        command = re.sub(rf"(?<=--model ){large}(?!\S)", small, command)
    for script, flags in SMALL.items():
        if output and script != "evaluate.py":
            flags += f" --output {output}"
        command = re.sub(rf"(?<= ){script}", f"{ROOT / script} {flags}", command)
    command = re.sub(r"(?<= )data\.py (\w+)", rf"{ROOT / 'data.py'} \1 --data demo:test", command)
    command = command.replace("deepspeed ", "deepspeed --num_accelerators 2 ")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-ec", command], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PATH": path, "HOME": str(folder)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's first command has run, with the README's rows as files."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "length.py").write_text(
        "def score(prompt, answers, reference):\n    return [sum(map(ord, a)) for a in answers]\n")
    conversation, pair = (line for line in LINES if line.startswith("{"))
    (folder / "mine.jsonl").write_text(conversation)
    (folder / "pairs.jsonl").write_text(pair)
    table = run(CHAIN.partition("&& ")[2], folder)
    assert "| online-dpo |" in re.sub(" +", " ", table)
    return folder


@pytest.mark.parametrize("command", [
    pytest.param(c, marks=[pytest.mark.slow] if re.match(r"deepspeed \w*dpo", c) else [])
    for c in COMMANDS])
def test_command(command, place):
    """As written, but few steps, and the demo's models where large ones are named."""
    if not re.search("[A-Z]{2}", command):
        output = f"runs/{abs(hash(command))}"
        lines = run(command, place, output).splitlines()    # the launcher may add one of its own
        assert json.loads([line for line in lines if line.startswith("{")][-1])


@pytest.mark.slow
def test_loop_over_beta(place):
    loop = re.search(r"`(for b in [^`]*done)`", README)[1]
    run(loop, place)
    folders = {path.parent.name for path in (place / "runs").glob("beta-*/run.json")}
    assert folders == {"beta-0.01", "beta-0.05", "beta-0.1"}


def test_snippets(capsys):
    """They run one after the other; the loss is ln 2, the ranking 1 and -1."""
    names = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["loss"].item() == pytest.approx(0.693147, abs=1e-5)
    assert names["scores"].tolist() == [1, -1]
    assert [i for i, t in enumerate(names["targets"]) if t]


def test_tables_name_what_exists():
    """Functions as `module.name`, subcommands of evaluate.py, flags of any script, files."""
    functions = re.findall(r"`(kernels|data|sft|dpo|online_dpo|evaluate)\.([a-z]\w*)`", README)
    assert len(functions) > 20
    for module, name in functions:
        assert name == "py" or hasattr(importlib.import_module(module), name), (module, name)
    help_texts = "".join((ROOT / f"{module}.py").read_text() for module in
                         ("data", "sft", "dpo", "online_dpo", "evaluate"))
    for flag in set(re.findall(r"(?<=[`\s])--[a-z][\w-]+", README)):
        known = f'"{flag}"' in help_texts or flag in (
            "--slow", "--real-data", "--port", "--hostfile", "--bench")
        assert known, flag
    commands = evaluate.parser()._subparsers._group_actions[0].choices
    for name in re.findall(r"`evaluate\.py ([a-z-]+)", README):
        assert name in commands, name
    for model in LARGE:
        assert model in str(sft.PRESETS) or model in README


def test_lines_are_few_and_short():
    prose = re.sub(r"^    .*$", "", re.sub(r"(?s)```.*?```", "", README), flags=re.M)
    assert "## Tests" in prose
    assert README.count("\n") <= 260
    assert [line for line in prose.splitlines() if len(line) > 120] == []
    assert 100 * prose.count(";") / len(prose.split()) < 0.3


def test_requirements_are_pinned_with_a_reason():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.match(r"[\w-]+==[\d.]+ +# \w", line), line
