"""Numbers from files to verdicts: nothing is mixed, nothing is lost without being counted, and the tests are exact."""
import itertools, json, math, warnings
from fractions import Fraction

import pytest
from conftest import ROOT

np = pytest.importorskip("numpy")
evidence = pytest.importorskip("gatednb.evidence")
from gatednb import trials
from gatednb.statistics import bootstrap_mean, holm, sign_flip_p
from gatednb.training import Options

@pytest.fixture
def experiment(monkeypatch):
    "An experiment that trains nothing."
    budgets = {"full": trials.Budget("to the end", Options()),
               "quick": trials.Budget("quick: cut short", Options(iterations=9), {"validation": 5})}
    made = trials.Experiment("nothing", "nothing at all", None, None, ("old", "new", "wild"), budgets)
    monkeypatch.setitem(trials.experiments, made.name, made)
    return made.name

def write(folder, gate, scores, budget="full", **changes):
    "Results with these accuracies for seeds 0, 1, …, as files; None for a trial that diverged."
    for trial, score in zip(trials.make_trials("nothing", [gate], range(len(scores)), budget, **changes), scores):
        metrics = {"test_accuracy": score, "test_loss": None, "iterations": 100 + trial.seed, "parameters": 7,
                   "milliseconds_per_iteration": 1.5}
        result = {"configuration": trial.configuration(), "metrics": metrics,
                  "status": "diverged" if score is None else "finished"}
        trials.write(trials.result_path(trial, folder), trials.sealed(result))

OLD = [.9800, .9810, .9790, .9805, .9795, .9802, .9808, .9792]
NEW = [round(v + .004 + .0001 * i, 4) for i, v in enumerate(OLD)]

@pytest.fixture
def folder(tmp_path, experiment):
    write(tmp_path, "old", OLD)
    write(tmp_path, "new", NEW)
    write(tmp_path, "wild", [None, .99, .99, None, .99, .99, .99, .99])
    write(tmp_path, "old", [.5, .6], "quick")
    write(tmp_path, "new", [.1], patience=1)
    write(tmp_path, "new", [.2], patience=2)
    return tmp_path

def test_from_files_to_the_verdict(folder):
    results = evidence.load_results("nothing", "full", folder)
    better, wild = evidence.compare_all(results, "old")[:2]
    if better.second != "new": better, wild = wild, better
    assert better.shown() and (better.n, better.lost) == (8, 0) and better.p == 2 / 2**8 and better.p_holm == 4 / 2**8
    assert better.difference.value == pytest.approx(np.mean(np.subtract(NEW, OLD)))
    assert "higher than that of old by 0.435 points" in better.sentence(scale=100, unit=" points")
    assert (wild.n, wild.lost) == (6, 2) and "2 more lost to divergence" in wild.sentence()

def test_budgets_are_never_mixed(folder):
    results = evidence.load_results("nothing", folder=folder)
    rows = evidence.summary(results).set_index(["budget", "gate"])
    assert {label for label, _ in rows.index} == {"full", "quick", "full+ patience=1", "full+ patience=2"}
    assert rows.loc[("full", "old"), "mean"] == pytest.approx(np.mean(OLD)) and rows.loc[("quick", "old"), "n"] == 2
    assert [rows.loc[(f"full+ patience={k}", "new"), "mean"] for k in (1, 2)] == [.1, .2]
    with pytest.raises(ValueError, match="budgets full, full\\+ patience=1, full\\+ patience=2, quick"):
        evidence.compare_all(results, "old")
    changed = [r for r in results if r["configuration"]["budget"] == "full+"]
    with pytest.raises(ValueError, match="seed 0 twice"): evidence.compare(changed, changed, "test_accuracy")

def test_every_row_of_a_table_says_its_budget(folder):
    table = evidence.summary(evidence.load_results("nothing", folder=folder))
    lines = evidence.show_table(table, "nothing").split("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == list(table.budget)
    notes = evidence.show_table(table, "nothing").split("\n\n")[1:]
    assert "Budget *quick*: cut short." in notes and "Budget *full+ patience=2*: to the end; but patience=2." in notes
    with pytest.raises(ValueError, match="'budget'"): evidence.show_table(table.drop(columns="budget"), "nothing")

def test_what_diverged_is_counted_for_every_metric(folder):
    results = evidence.load_results("nothing", "full", folder)
    for metric in ("test_accuracy", "iterations"):      # a diverged trial has iterations, but none that compare
        row = evidence.summary(results, metric).set_index("gate").loc["wild"]
        assert (row.n, row.diverged) == (8, 2) and row.iterations == np.median([101, 102, 104, 105, 106, 107])
        assert list(evidence.comparison_table(results, "wild", metric).lost) == [2, 2]
    assert evidence.summary(results, "iterations").set_index("gate").loc["wild", "mean"] == np.mean([101, 102, 104, 105, 106, 107])
    everywhere = evidence.summary(results, "test_loss")     # no trial has one, though most of them finished
    assert (everywhere.diverged == everywhere.n).all() and everywhere["mean"].isna().all()

def test_no_results(tmp_path, experiment):
    assert evidence.load_results("nothing", folder=tmp_path) == [] and evidence.summary([]).empty
    with pytest.raises(ValueError, match="expected one of .*did you mean nothing"): evidence.load_results("nothin")

def exact_p(first, second):
    "The sign-flip test in whole numbers: accuracies as counts of 10,000 test images."
    d = [round(10_000 * b) - round(10_000 * a) for a, b in zip(first, second)]
    flips = [abs(sum(s * v for s, v in zip(signs, d))) for signs in itertools.product((-1, 1), repeat=len(d))]
    return Fraction(sum(f >= abs(sum(d)) for f in flips), len(flips))

@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_ties_among_accuracies_are_seen(n):
    rng, tied = np.random.default_rng(n), 0
    for _ in range(50):
        a, b = 9_800 + rng.integers(-4, 5, (2, n))
        p = exact_p(a / 10_000, b / 10_000)
        assert sign_flip_p(b / 10_000 - a / 10_000) == p
        tied += p > Fraction(2, 2**n)
    assert tied > 10

def test_holm_is_the_closed_test():
    rng = np.random.default_rng(0)
    for m in range(1, 7):
        p = rng.uniform(0, .2, m).round(2)
        sets = [c for k in range(1, m + 1) for c in itertools.combinations(range(m), k)]
        claims = [max(min(1, len(c) * min(p[list(c)])) for c in sets if i in c) for i in range(m)]
        assert holm(p) == pytest.approx(claims)

@pytest.mark.parametrize("values", [[0, 0, 1], [1, 1, 2], [0] * 9 + [1], [0] * 29 + [1], [.9829, .9829, .9828],
                                    [1e-12, 2e-12, 4e-12], [-1e9, 0, 1e9]], ids=str)
def test_intervals_of_odd_samples(values):
    found = bootstrap_mean(values)                      # a warning would be an error here
    rounding = 1e-15 * max(map(abs, values))
    assert min(values) - rounding <= found.low <= found.value <= found.high <= max(values) + rounding

@pytest.mark.parametrize("scale", [2**-20, 2**20])      # exact in binary, so that ties stay ties
def test_verdicts_do_not_depend_on_the_unit(scale):
    values = np.array([.1, .3, .2, .7, .25, .4])
    plain, changed = bootstrap_mean(values), bootstrap_mean(values * scale)
    assert (changed.low, changed.high) == (plain.low * scale, plain.high * scale)
    assert sign_flip_p(values * scale) == sign_flip_p(values) == sign_flip_p(-values)

def test_every_printed_table_can_be_read():
    papers = json.loads((ROOT / "results/reported.json").read_text(encoding="utf-8"))
    read = 0
    for paper, tables in papers.items():
        if not isinstance(tables, dict): continue
        for name, table in tables.items():
            if "rows" not in table: continue
            frame = evidence.reported(paper, name, ROOT / "results/reported.json")
            assert frame.to_numpy().tolist() == table["rows"] and frame.attrs["source"] == tables["source"]
            for cell in frame.to_numpy().flat:
                value, spread = evidence.printed(cell)
                assert ("±" in cell) == (not math.isnan(spread)) and not spread < 0
            read += 1
    assert read >= 12

def test_a_printed_table_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="reported.json"): evidence.reported("kaf", "Table 1")

def test_results_of_the_repository_are_whole():
    from gatednb import sequential_mnist as _      # registers its experiments
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in [e for e in trials.experiments if (ROOT / "results" / e).is_dir()]:
            assert evidence.load_results(name, folder=ROOT / "results")
