"""Pages to look at: report.html of evaluate.py, read as text and opened in a real browser without a
window (apt-get install chromium), and the notebook (pip install nbclient ipykernel)."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import data
import evaluate
from test_evaluate import add_evaluation, hand_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title = 'evil'</script> <img src='http://x.invalid/a.png'> & \"quoted\"\nnext line"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--window-size=1280,1600"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs: three prompts, of which the second run has answered two, and one's margins."""
    folder = tmp_path_factory.mktemp("page")
    runs = [hand_run(folder / name, lr=lr, eval_loss=lr) for name, lr in (("first", 0.1), ("second", 0.2))]
    answers = {"add 1 2": ("3", "4"), "sort b a": ("a b", EVIL), "what <b> means": ("bold $x $$ \\n", None)}
    for i, run in enumerate(runs):
        samples = [{"prompt": [data.user(prompt)], "reference": texts[0], "answer": texts[i],
                    "correct": texts[i] == texts[0]} for prompt, texts in answers.items() if texts[i]]
        add_evaluation(run, "exact-match", samples, score=100 - 50 * i, low=40, high=100)
    add_evaluation(runs[1], "margins", margin_after=1.0)
    data.figure(Path(runs[1]) / "evaluate/margins/margins.png", [{"series": {"a": 1.0}, "xlabel": "margin"}])
    result = evaluate.main(["report", *runs, "--output", str(folder / "out")])
    assert result["scores"][0].keys() == {"exact-match", "eval_loss", "eval_margin", "eval_accuracy"}
    return folder / "out/report.html"


def test_page_holds_all_and_escapes_it(page):
    """The text of a cell is the answer itself; nothing but data: is loaded; no markup of an answer is left."""
    text = page.read_text(encoding="utf-8")
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", text, re.S)]
    assert f"✗ {EVIL}" in cells
    assert "✓ bold $x $$ \\n" in cells
    assert "what <b> means" in cells
    assert "100.0 (40.0 .. 100.0)" in cells
    assert "--lr" in cells and "--beta" not in cells
    assert text.count("<script>") == 1 == text.count("</script>")
    sources = re.findall(r"(?:src|href)=[\"']?([^\"' >]{,30})", re.sub("<td>.*?</td>", "", text, flags=re.S))
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)


def browser(page, folder, script, *flags):
    """The value of the JavaScript `script`, after the page's own, in a real browser."""
    if not CHROMIUM:
        pytest.skip("no browser: apt-get update && apt-get install -y chromium")
    copy = folder / "copy.html"
    more = f"<script>window.onload = () => {{ document.body.dataset.found = JSON.stringify({script}); }};</script>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", more + "</body>"), encoding="utf-8")
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", *flags, copy.as_uri()],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'<body data-found="(.*?)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def searched(text):
    """JavaScript: the prompts that are left when a user types `text`."""
    return f"""(search.value = {json.dumps(text)}, search.dispatchEvent(new Event("input")),
        rows.filter(row => row.offsetHeight > 0).map(row => row.cells[1].textContent))"""


def test_page_in_a_browser(page, tmp_path):
    """Rows, pictures that load, cells marked right or wrong, and no script of an answer has run."""
    found = browser(page, tmp_path, """{
        title: document.title, runs: [...document.querySelectorAll("#runs th")].map(x => x.textContent),
        pictures: [...document.images].map(x => x.naturalWidth), prompts: rows.length,
        right: document.querySelectorAll(".right").length, wrong: document.querySelectorAll(".wrong").length}""")
    assert found["title"] == "Runs"
    assert [name.rpartition("--")[2] for name in found["runs"]][-2:] == ["first", "second"]
    assert len(found["pictures"]) == 2 and min(found["pictures"]) > 100
    assert (found["prompts"], found["right"], found["wrong"]) == (3, 3, 2)


@pytest.mark.parametrize("text, prompts", [
    ("", ["add 1 2", "sort b a", "what <b> means"]), ("SORT", ["sort b a"]), ("bold", ["what <b> means"]),
    ("✗", ["add 1 2", "sort b a"]), ("nothing like it", [])])
def test_search_filters_prompts(page, tmp_path, text, prompts):
    """By any column, upper or lower case."""
    assert browser(page, tmp_path, searched(text)) == prompts


@pytest.mark.slow
def test_notebook(tmp_path):
    """All cells run, and no outputs are stored. Half of the training answers are wrong, and DPO learns which half."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    path = Path(__file__).with_name("demo.ipynb")
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    right = dict(re.findall(r"(sft|dpo): (\d+)% of 100", text))
    assert int(right["sft"]) < 75 < int(right["dpo"])
    assert "loss where the policy is the reference: 0.6931" in text
