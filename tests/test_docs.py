"""Every Python snippet of README.md and docs/ runs and prints what stands below it; every link leads somewhere."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)

pytestmark = pytest.mark.usefixtures("one_thread")


def pages(pattern: str):
    found = [page for page in PAGES if re.search(pattern, page.read_text(), re.M)]
    return pytest.mark.parametrize("page", found, ids=lambda page: str(page.relative_to(ROOT)))


@pages("^```python")
@pytest.mark.filterwarnings("ignore")
def test_snippets_run(page, tmp_path, monkeypatch):
    """One after another, in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    namespace = {"__name__": "snippet"}
    monkeypatch.setitem(sys.modules, "snippet", type(sys)("snippet"))
    for code, below in SNIPPET.findall(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if below:
            assert printed.getvalue() == below


def test_the_fifth_method_trains_and_resumes(tmp_path, monkeypatch):
    """The page's whole method, saved as a file: killed after an epoch, it ends as if it had not been."""
    (tmp_path / "selftrain.py").write_text(SNIPPET.search((ROOT / "docs" / "fifth_method.md").read_text())[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import selftrain

    whole = selftrain.train(selftrain.Config(seed=1, epochs=2, steps=8), None)
    save = selftrain.Run.save

    def save_and_die(run, *figures, **state):
        save(run, *figures, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(selftrain.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        selftrain.train(selftrain.Config(seed=1, epochs=2, steps=8), None)
    monkeypatch.setattr(selftrain.Run, "save", save)
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert selftrain.train(selftrain.Config(seed=1, epochs=2, steps=8), folder).history == whole.history
    assert whole.history[-1]["pseudo_label_accuracy"] > 0.8


@pages(r"\]\([^)]+\)")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
