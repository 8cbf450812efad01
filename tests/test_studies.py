"""Every study's --quick: whole arms in seconds on made data, the same code as the real study."""
import importlib
import json
import shlex

import numpy as np
import pytest

import data
import sft
import studies

STUDIES = ["real_model", "online"]
SLOW = ["beta", "losses", "scaling", "report", "packing", "margins", "reference", "length",
        "selection"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", [
    *STUDIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_quick_study_leaves_numbers_and_a_picture(name, work):
    study = importlib.import_module(f"study_{name}")
    result = study.main(["--quick", "--work", str(work)])
    file = work / f"study-{name.replace('_', '-')}"
    assert json.loads(file.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result["verdict"]
    assert file.with_suffix(".json").stat().st_size < 50_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta", "scaling"])
def test_quick_study_of_a_model_on_judged_pairs(name, work):
    flags = ["--quick", "--work", str(work)]
    model = studies.demo_sft(studies.arguments("", flags))
    result = importlib.import_module(f"study_{name}").main([*flags, "--model", str(model)])
    assert result["verdict"] and (work / f"study-{name}-judged.png").exists()


def test_judged_accuracy_is_a_mean_of_each_prompts_pairs(monkeypatch, tmp_path):
    """Pairs of prompts a, b, a, a, the last equal to the first; evaluate.py's rows come in another
    order. Right: the pair of b and one of the two of a: 1/2 and 1, 75% in all."""
    rows = [dict(prompt=p, chosen=c, rejected="no") for p, c in ("aw", "bx", "ay", "aw")]
    monkeypatch.setattr(studies, "judged_pairs", lambda *_: rows)

    def margins(*_, output, **__):
        lines = [dict(row=3, before=1, after=0), dict(row=1, before=-1, after=0),
                 dict(row=2, before=5, after=6)]
        data.write_lines(output / "margins.jsonl", map(json.dumps, lines))
    monkeypatch.setattr(studies, "evaluation", margins)
    args = studies.arguments("", ["--work", str(tmp_path)])
    assert studies.judged_accuracies(args, tmp_path).tolist() == [0.5, 1]
    stored = json.loads((tmp_path / "evaluate/judged-accuracy/result.json").read_text())
    assert stored["score"] == 75


def test_a_constraint_is_read_from_the_prompt_and_checked():
    import study_real_model as study
    table = {"short": ("one two", "w " * 31), "sentence": ("It is 3.5 m.", "It is. It was."),
             "sure": ("Sure, here.", "Yes. Sure."), "commas": ("a b", "a, b")}
    for row in study.constrained(["question"] * 4):
        prompt = row["messages"][:1]
        good, bad = table[study.kind_of(prompt)]
        assert study.satisfied(prompt, [good, bad, ""], None) == [1, 0, 0]


def test_verdict_needs_an_interval_without_zero():
    same = np.zeros((3, 50))
    assert studies.verdict(studies.difference(same, same)) == "undecided"
    assert studies.verdict(studies.difference(same + 1, same)) == "agrees"
    assert studies.verdict(studies.difference(same, same + 1)) == "disagrees"


def test_rank_correlation_with_interval():
    from study_report import correlation, rank_correlation
    assert rank_correlation(np.array([1, 2, 3]), np.array([3, 1, 2])) == pytest.approx(-0.5)
    x = np.arange(20.0)
    assert list(correlation(x, x ** 3).values()) == pytest.approx([1, 1, 1])
    assert correlation(x, np.zeros(20))["mean"] is None


def test_plan_for_a_gpu_has_commands_that_parse_and_hours_of_the_bench(tmp_path, capsys):
    """The online row by hand, at 1,000 tokens trained and 100 sampled a second: 10,000 pairs, 1.25
    epochs of 1,000 tokens, 50,000 answers of 300 tokens: (12,500 + 150,000) s = 45.14 h. DPO
    trains at ZeRO 3: 10,000 pairs x 6.25 epochs x 1,000 tokens / 500 = 34.72 h."""
    import plan_gpu
    bench = tmp_path / "bench.json"
    bench.write_text("engine ..\n" + json.dumps({
        "device": "made", "engine": {"ok": True, "ZeRO 1, 8192": {"tokens_per_s": 1000},
                                     "ZeRO 3, 8192": {"tokens_per_s": 500}},
        "sampling": {"ok": True, "tokens_per_s_at_most": {"continuous, 256 rows": 100,
                                                          "padded, 64 rows": 500}}}))
    result = plan_gpu.main(["--bench", str(bench)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines()[2:]]
    hours = {line[1]: float(line[5]) for line in lines}
    assert [hours[line[1]] for line in lines if line[0] == "online"] == [pytest.approx(45.14, 1e-3)]
    dpo = next(h for command, h in hours.items() if command.endswith("--output runs/dpo-10k"))
    assert dpo == pytest.approx(34.72, 1e-3)
    assert result["hours"] == pytest.approx(sum(hours.values()), 1e-2)
    assert result["commands"] == len(hours) > 40                        # no command twice
    for command in hours:
        _, script, *flags = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py"))
        if hasattr(module, "PRESETS"):
            sft.parse(flags, module.parser(), module.PRESETS)
        else:
            module.parser().parse_args(flags)
    bench.write_text(json.dumps({"device": "made", "engine": {"ok": False}}))
    with pytest.raises(ValueError, match="part engine is missing or failed"):
        plan_gpu.main(["--bench", str(bench)])
