"""The notebooks for Colab: plain Markdown, working links, and a package that is installed from a wheel of this tree."""
import os, re, shutil, subprocess, sys, sysconfig, venv
from pathlib import Path

import nbformat, pytest
from conftest import ROOT

book = pytest.importorskip("gatednb.book")

@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    "The notebooks, generated afresh: name to notebook."
    return {path.stem: nbformat.read(path, as_version=4) for path in book.write_colab(tmp_path_factory.mktemp("colab"))}

def texts(notebook, kind="markdown"):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]

def without_blocks(text):
    "A text without its blocks of code."
    return re.sub(r"^ *(`{3,}|~{3,})(?!\{).*?^ *\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)

def without_code(text):
    "A text without its blocks and pieces of code."
    return re.sub(r"(`+).+?\1", "", without_blocks(text))

MYST = re.compile(r"\{[\w:-]+\}`|^[ >]*(?:`{3,}|:{3,})\{|^\([\w:.-]+\)=|\$\$[ \t]*\([\w:.-]+\)[ \t]*$", re.MULTILINE)

def test_myst_is_seen():
    for text in ("see {eq}`a`", "```{note}\nx\n```", ":::{note}", "(here)=\n# A", "$$ x $$ (a)"): assert MYST.search(text), text

def test_every_chapter_is_there(generated):
    assert {"02_symbols", "03_gates"} <= set(generated)
    assert "92_book" not in generated

def test_nothing_of_the_book_remains(generated):
    left = {name: found[0] for name, notebook in generated.items() for text in texts(notebook)
            if (found := MYST.search(without_blocks(text)))}
    assert not left
    directives = {name for name, notebook in generated.items() for code in texts(notebook, "code")
                  if re.search(r"^\s*#\s*\|", code, re.MULTILINE)}
    assert not directives

def test_links_lead_somewhere(generated, site):
    "Every link to the book names a page that exists, and a place on it."
    address, wrong = book.book_url(), []
    for name, notebook in generated.items():
        text = "\n".join(without_code(text) for text in texts(notebook))
        for page, anchor in re.findall(re.escape(address) + r"([^)\s#]*)(?:#([^)\s]+))?", text):
            file = site / (page or "index.html")
            if not file.is_file() or (anchor and f'id="{anchor}"' not in file.read_text(encoding="utf-8")):
                wrong.append((name, page, anchor))
    assert not wrong

def test_formulas_are_closed(generated):
    odd = {name for name, notebook in generated.items() for text in texts(notebook) if without_code(text).count("$$") % 2}
    assert not odd

def test_colab_gives_a_gpu_and_installs_first(generated):
    for notebook in generated.values():
        assert notebook.metadata.accelerator == "GPU"
        assert "pip" in notebook.cells[0].source and "GATEDNB_SOURCE" in notebook.cells[0].source
        nbformat.validate(notebook)

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of the working tree."
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "gatednb", source / "gatednb", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))

@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "A new environment that sees the packages of this one, but not gatednb."
    folder, packages = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "gatednb" not in path.name.lower(): (packages / path.name).symlink_to(path)
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    purelib = subprocess.run([python, "-c", where], capture_output=True, text=True).stdout.strip()
    (Path(purelib) / "packages.pth").write_text(f"{packages}\n")
    return python

def test_a_chapter_runs_from_a_wheel(generated, wheel, elsewhere, tmp_path):
    "As on Colab: no checkout, no gatednb, and the first cell installs it."
    notebook, file = generated["03_gates"], tmp_path / "chapter.ipynb"
    notebook.cells.append(nbformat.v4.new_code_cell("import gatednb; print('INSTALLED', gatednb.__file__)"))
    nbformat.write(notebook, file)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GATEDNB_DATA")}
    absent = subprocess.run([elsewhere, "-c", "import gatednb"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ModuleNotFoundError" in absent.stderr
    environment |= {"GATEDNB_SOURCE": str(wheel), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "MPLBACKEND": "agg"}
    command = [elsewhere, "-m", "IPython", "--colors=NoColor", file]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    installed = re.search(r"INSTALLED (.*)", done.stdout)[1]
    assert Path(installed).is_relative_to(elsewhere.parent.parent)
