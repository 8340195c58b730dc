"""The machinery around the chapters: what the reader makes of the real notebooks, the pages, and the Makefile."""
import configparser, os, re, shutil, stat, subprocess

import nbformat, pytest, yaml
from conftest import ROOT

book = pytest.importorskip("gatednb.book")
CHAPTERS = book.chapters(ROOT)

@pytest.fixture(autouse=True)
def inside(monkeypatch):
    monkeypatch.chdir(ROOT)

@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_reader_takes_directives_out_and_nothing_else(path):
    before, after = nbformat.read(path, as_version=4), book.read_notebook(path.read_text(encoding="utf-8"))
    assert len(before.cells) == len(after.cells)
    for old, new in zip(before.cells, after.cells):
        if new.cell_type == "code": assert not re.search(r"^\s*#\s*\|", new.source, re.MULTILINE)
        else: assert new.source == old.source
    nbformat.validate(after)

def test_every_chapter_shows_its_time_and_opens_in_colab(site):
    for path in CHAPTERS:
        page = (site / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        if book.runs_on_colab(nbformat.read(path, as_version=4)):
            assert re.search(r"Runs in \d+ s on a CPU", page) and f'href="{book.colab_url(path.stem)}"' in page, path.stem
            assert (site / "colab" / path.name).is_file()
        else: assert '<a class="chapter-button"' not in page, path.stem

def test_hidden_cells_are_hidden(site):
    for path in CHAPTERS:
        page = (site / "nbs" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "tag_remove-cell" not in page, path.stem
        assert path.stem in ("92_book", "95_traceability") or "default_exp" not in page, path.stem

def test_addresses_are_written_once():
    "settings.ini, CITATION.cff and the book agree."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    known, citation = config["DEFAULT"], yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == known["version"]
    assert citation["repository-code"] == known["git_url"]
    assert citation["url"] == known["doc_host"] + known["doc_baseurl"]

def make(*arguments, cwd=ROOT):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

def test_make_lists_its_targets():
    shown = make().stdout
    assert shown == make("help").stdout
    assert {line.split()[0] for line in shown.splitlines()} >= {"help", "env", "export", "book", "test", "clean"}

def test_an_old_python_is_refused_with_words(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\nshift\nexec python3 -c "import sys; sys.version_info = (3, 9, 1); $1"\n', encoding="utf-8")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = make("env", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode != 0 and "3.11 or newer; this is 3.9" in done.stderr, done.stderr
    assert not (tmp_path / ".venv").exists()
