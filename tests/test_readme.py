"""The README's commands run and its table points at the right lines."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpo
import online_dpo
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", README, re.M)


def test_table_names_the_line_of_each_function():
    named = re.findall(r"`(\w+)` (\w+\.py):(\d+)", README)
    assert len(named) >= 9
    for name, file, line in named:
        assert (ROOT / file).read_text().splitlines()[int(line) - 1].startswith(f"def {name}("), (name, file)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """What `python sft.py` leaves after forty steps: its answers are text, if wrong."""
    folder = tmp_path_factory.mktemp("sft")
    sft.main(["--max-steps", "40", "--eval-samples", "0", "--output", str(folder / "run"), "--cache-dir",
              str(folder / "cache")])
    return str(folder / "run")


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("pip", "pytest"))])
def test_command(command, policy, tmp_path):
    """As written, but few steps into a temporary folder, and the demo model where a large one is named."""
    program, *args = command.split()
    if args[0] == "evaluate.py":
        return evaluate_command(args, policy, tmp_path)
    judge = tmp_path / "judge.py"                           # forty steps of SFT answer little right: any difference will do
    judge.write_text("def score(prompt, answers, reference):\n    return [sum(map(ord, a)) % 97 for a in answers]\n")
    if program == "deepspeed":
        assert {"dpo.py": dpo, "online_dpo.py": online_dpo, "sft.py": sft}[args[0]].PRESETS["gemma-2b"]["model"] == args[2]
        run = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", args[0]]
    else:
        run = [sys.executable, *args]
    if args[0] == "dpo.py" and args[1:2] == ["sweep"]:
        run += ["--max-steps", "2", "--preset", "demo", "--model", policy, "--output", str(tmp_path / "sweep"),
                "--eval-samples", "8"]
    elif args[0] == "dpo.py":
        run = run[:run.index("dpo.py") + 1] + ["--preset", "demo", "--model", policy, "--max-steps", "2", "--max-pairs",
                                               "64", "--eval-samples", "8", "--output", str(tmp_path / "run")]
        if "--ref" in args:
            run += ["--ref", policy]
    if args[0] == "online_dpo.py":
        run = run[:run.index("online_dpo.py") + 1] + [
            "--preset", "demo", "--model", policy, "--max-steps", "2", "--max-prompts", "32", "--iterations", "1", "--truncated-can-win",
            "--eval-samples", "8", "--max-new-tokens", "8", "--judge", f"python:{judge}:score", "--output", str(tmp_path / "run")]
    if args[0] == "data.py" and args[1] != "show":
        run += ["--output", str(tmp_path / "run")]
    if "--near" in args:
        pytest.importorskip("rensa")
    if args[0] == "sft.py":
        run += ["--max-steps", "2", "--eval-samples", "8", "--output", str(tmp_path / "run")]
    done = subprocess.run([*run, "--cache-dir", str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = [line for line in done.stdout.splitlines() if line.startswith("{")][-1]
    assert json.loads(last)


def evaluate_command(args, policy, tmp_path):
    """As written, in a folder whose runs are the small model's; those of a curve are a record each."""
    run = json.loads((Path(policy) / "run.json").read_text())
    for name in ("sft", "dpo", "online-dpo", *(f"curve/{k}" for k in range(1, 5))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in Path(policy).iterdir():
            (tmp_path / "runs" / name / file.name).symlink_to(file)
        if name.startswith("curve"):
            made = run | {"result": run["result"] | {"exact_match": 0.5, "cumulative": {"steps": int(name[-1])}}}
            (tmp_path / "runs" / name / "run.json").unlink()
            (tmp_path / "runs" / name / "run.json").write_text(json.dumps(made))
    args = [str(p) for a in args[1:] for p in (sorted(tmp_path.glob(a)) if "*" in a else [a])]
    if "judge" in args:
        args += ["--limit", "6"]
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *args], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])


def test_requirements_are_pinned_with_a_reason():
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all("#" in x for x in lines)
