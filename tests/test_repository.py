"""What must hold of the repository as a whole: one source for everything, nothing generated left behind."""
import configparser, importlib.metadata, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat, pytest, yaml
from conftest import ROOT, SITE

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
READ = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
MEASURED = [name for name in READ if re.match(r"[13]\d\w*_", name)]                # parts whose numbers must be computed

def settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the sources, exported and cleaned as `make export` does."
    copy = tmp_path_factory.mktemp("repository")
    for name in ("nbs", "gatednb"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, copy)
    for module in (copy / "gatednb").rglob("*.py"):
        if module.name != "__init__.py": module.unlink()                        # a module whose notebook is gone must not survive
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).parent / tool], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy

def differing(folder, copy, pattern):
    "The files that are not the same in a folder and its copy."
    names = {path.relative_to(base) for base in (folder, copy) for path in base.rglob(pattern) if "__pycache__" not in path.parts}
    def content(path): return path.read_text(encoding="utf-8") if path.is_file() else None
    return sorted(str(name) for name in names if content(folder / name) != content(copy / name))

def test_modules_are_what_the_notebooks_export(exported):
    assert not differing(ROOT / "gatednb", exported / "gatednb", "*.py"), "run `make export`"

def test_notebooks_are_clean(exported):
    assert not differing(ROOT / "nbs", exported / "nbs", "*.ipynb"), "run `make export`"

@pytest.mark.parametrize("name", READ)
def test_no_outputs_are_committed(name):
    assert not any(cell.outputs or cell.execution_count for cell in READ[name].cells if cell.cell_type == "code")

@pytest.mark.parametrize("name", READ)
def test_cells_are_small(name):
    long = [cell.source.split("\n")[0] for cell in READ[name].cells if cell.cell_type == "code" and cell.source.count("\n") >= 40]
    assert not long

@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted((ROOT / "nbs").glob("*.md"))], ids=lambda path: path.stem)
def test_pages_are_read_in_a_sitting(path):
    book = pytest.importorskip("gatednb.book")
    assert book.reading_minutes(book.page_as_notebook(path)) <= 25

EXEMPT = {"index", "91_api", "92_book", "93_plots", "94_exercises", "95_traceability", "96_errata", "98_symbols", "99_solutions"}

@pytest.mark.parametrize("name", sorted(set(READ) - EXEMPT))
def test_chapters_have_exercises(name):
    text = "\n".join(cell.source for cell in READ[name].cells)
    asked = re.findall(r"\{exercise\}[^\n]*\n:label: (ex-\S+)", text)
    solved = re.findall(r"\{solution-start\} (\S+)", text)
    assert len(asked) >= 5 and sorted(asked) == sorted(solved)
    assert len(set(re.findall(r"\bcheck_\w+(?= = Question)", text))) >= 3

def test_every_notebook_is_in_the_table_of_contents():
    named = set(re.findall(r"nbs/([\w-]+)", (ROOT / "_toc.yml").read_text(encoding="utf-8")))
    assert set(READ) <= named

CODE = re.compile(r"^ *(`{3,}|~{3,})(?!\{).*?^ *\1`* *$", re.DOTALL | re.MULTILINE)
NOT_PROSE = [CODE, re.compile(r"\$\$.*?\$\$", re.DOTALL), re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
             re.compile(r"\$[^$\n]+\$"), re.compile(r"(`+).+?\1"), re.compile(r"^ *:[\w-]+:.*$", re.MULTILINE),
             re.compile(r"\]\([^)]*\)"), re.compile(r"https?://\S+"), re.compile(r"arXiv:\S+")]

def prose(text):
    "A text without its formulas, code, options of directives and addresses."
    for pattern in NOT_PROSE: text = pattern.sub(" ", text)
    return text

def typed_numbers(text):
    "The decimal numbers and percentages in the prose of a text."
    return re.findall(r"(?<![\w.])(?:\d*\.\d+|\d+(?:\.\d+)?\s?%)", prose(text))

def test_typed_numbers_are_seen():
    assert typed_numbers("It gains 1.5 points, or 3 % of .7, on 28 images.") == ["1.5", "3 %", ".7"]
    assert typed_numbers("At $s = .5$ and `x = 1.5`, see [1](a/1.5.html), in 2.\n\n$$ 1.5 $$ (a)\n\n```python\n1.5\n```\n") == []

@pytest.mark.parametrize("name", MEASURED)
def test_results_are_not_typed(name):
    found = {number: cell.source[:60] for cell in READ[name].cells if cell.cell_type == "markdown"
             for number in typed_numbers(cell.source)}
    assert not found

class Figures(HTMLParser):
    "Collects the pictures of a page that have no words: an img without alt, an svg that is neither named nor hidden."
    def __init__(self):
        super().__init__()
        self.article, self.depth, self.wordless = False, 0, []
    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if tag == "article": self.article = True
        if not self.article: return
        if tag == "img" and not (known.get("alt") or "").strip(): self.wordless.append(str(known)[:200])
        if tag == "svg":
            named = known.get("aria-label") or known.get("aria-labelledby") or known.get("aria-hidden") == "true"
            if not self.depth and not named: self.wordless.append(str(known)[:200])
            self.depth += 1
    def handle_endtag(self, tag):
        if tag == "article": self.article = False
        if tag == "svg": self.depth = max(0, self.depth - 1)

def wordless(html):
    "The pictures of a page that have no words."
    parser = Figures()
    parser.feed(html)
    return parser.wordless

def test_pictures_without_words_are_seen():
    page = '<article><img src="a.png" alt="">{}<svg aria-label="b"><svg></svg></svg><svg><path/></svg></article>'
    assert len(wordless(page.format('<img src="b.png" alt="words">'))) == 2

def test_every_figure_is_described(site):
    found = {path.name: wordless(path.read_text(encoding="utf-8")) for path in (site / "nbs").glob("*.html")}
    found = {name: missing for name, missing in found.items() if missing}
    assert not found

def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}

def test_requirements_are_pinned():
    known = settings()
    wanted = " ".join(known[key] for key in known if key.endswith("requirements")).split()
    names = {re.match(r"[\w.-]+", one)[0].lower() for one in wanted}
    assert not names - set(pins())

def test_pins_are_installed():
    installed = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "nbdev", "jupyter-book", "sphinx")}
    assert installed == {name: pins()[name] for name in installed}, "constraints.txt is not what is installed: run `make env`"

def test_version_is_written_once():
    import gatednb
    assert gatednb.__version__ == settings()["version"]

def test_workflows_are_yaml():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert "jobs" in yaml.safe_load(path.read_text(encoding="utf-8")), path.name
