"""Every equation of the papers has a test in a chapter, which stands on its own and fails when the equation is changed."""
import multiprocessing, os
from concurrent.futures import ThreadPoolExecutor

import changed, pytest
from conftest import ROOT

contents = pytest.importorskip("gatednb.contents")
ITEMS = [item for paper in contents.papers(ROOT) for item in contents.items(paper, ROOT)]
EQUATIONS = [item for item in ITEMS if item.kind == "equation"]
TESTS = contents.tests(ROOT)
name_of = lambda item: " ".join(item.key)

PROCESSES = multiprocessing.get_context("forkserver")                           # forked before the package is imported
PROCESSES.set_forkserver_preload(["torch", "sympy", "matplotlib.pyplot", "seaborn", "changed"])

def prepared(item, path, cell, change=None):
    "A tracing cell's program, and (name, source) of the module that the change of an equation changes, or None."
    source, module = contents.program(path, cell), None
    if change:
        start, name = item.definition.rsplit(".", 1)
        if start != path.stem:
            file = ROOT.joinpath(*start.split(".")).with_suffix(".py")
            module = start, contents.changed(file.read_text(encoding="utf-8"), name, change)
        if contents.definition_span(source, name): source = contents.changed(source, name, change)
    return source, module

def outcome(source, module):
    "How a program ends: \"passed\", \"failed\" or a traceback."
    answer = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(target=changed.run, args=(source, module, answer))
    process.start()
    process.join(120)
    if process.is_alive(): process.kill()
    return answer.get() if not answer.empty() else f"ended with {process.exitcode}"

def test_what_is_traced_exists():
    assert not set(TESTS) - {item.key for item in ITEMS}
    assert len({item.key for item in ITEMS}) == len(ITEMS)

@pytest.mark.parametrize("item", EQUATIONS, ids=name_of)
def test_equation_has_a_test(item):
    assert item.key in TESTS and item.definition and len(item.change) == 2
    assert contents.defining_notebook(item.definition, ROOT)

@pytest.fixture(scope="module")
def outcomes():
    "How every tracing cell ends, as it is and with the change of each of its equations: (key or None, cell's id) → outcome."
    programs = {}                                       # read here: Python 3.11 may fail when two threads parse (gh-106905)
    for item in EQUATIONS:
        for path, _, cell in TESTS.get(item.key, []):
            programs.setdefault((None, cell.id), prepared(item, path, cell))
            programs[item.key, cell.id] = prepared(item, path, cell, item.change)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {which: pool.submit(outcome, *program) for which, program in programs.items()}
    return {which: job.result() for which, job in jobs.items()}

@pytest.mark.parametrize("item", EQUATIONS, ids=name_of)
def test_passes_alone_and_fails_when_the_equation_is_changed(item, outcomes):
    cells = [cell.id for _, _, cell in TESTS.get(item.key, [])]
    assert cells
    assert [outcomes[None, cell] for cell in cells] == ["passed"] * len(cells)
    assert "failed" in [outcomes[item.key, cell] for cell in cells]
