"The benchmark: whoever can take part does the work that is timed, whoever cannot is said to be missing."
import json, sys

import pytest
from click.testing import CliRunner
from conftest import ROOT

from gatednb import benchmark, cli
from gatednb.benchmark import Size, Suite, contestants

TINY = Size(3, 2, 4, 5)
PEERS = [name for name, one in contestants.items() if one.package]
OWN = [name for name in contestants if name not in PEERS and "compiled" not in name]

@pytest.fixture
def try_suite(monkeypatch):
    "A suite of two layers, which takes a second."
    monkeypatch.setitem(benchmark.suites, "try", Suite("a try", (TINY,), ("nn.GRU", "GRU")))
    monkeypatch.setitem(cli.benchmark_budgets, "quick", (["try"], 1, .05, False))

@pytest.mark.parametrize("name", OWN)
def test_own_layers_and_pytorchs_start(name):
    assert all(callable(run) for run in benchmark.start(name, TINY))

def test_peers_run_or_say_why_not():
    "In a process of its own: JAX does not like to be forked, which other tests do."
    job = {"kind": "times", "size": TINY, "names": PEERS, "allocator": "default", "process": 0, "seconds": 0, "threads": 1}
    found = benchmark.measured(job)["found"]
    assert list(found) and set(found) == set(PEERS)
    for name, taken in found.items():
        if isinstance(taken, str): assert contestants[name].package in taken or "it fails" in taken
        else: assert 0 < taken["forward"] and 0 < taken["both"]

@pytest.mark.parametrize("name,module", [("torchrecurrent MGU", "torchrecurrent"), ("flax GRU", "flax"), ("sru", "sru"),
                                         ("minGRU-pytorch", "minGRU_pytorch")])
def test_a_peer_that_is_not_installed_is_missing(name, module, monkeypatch):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]: monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    found = benchmark.race(TINY, [name, "GRU"], 0)
    assert found[name].startswith(f"pip install {contestants[name].package}") and isinstance(found["GRU"], dict)
    record = {"rows": [{"suite": "layers", "allocator": "default", "size": list(TINY), "names": [*found], "found": found}]}
    text = benchmark.table(record, "layers")
    assert f"{name} is missing: pip install" in text
    lines = [line for line in text.splitlines() if line.startswith(f"{name} / ")]
    assert len(lines) == 2 and all(line.split()[-1] == "–" for line in lines)
    record = {"rows": [{"suite": "memory", "allocator": "default", "size": list(TINY), "names": [name], "found": "pip install it"}]}
    assert f"{name} is missing: pip install it" in benchmark.table(record, "memory")

def test_own_errors_are_errors(monkeypatch):
    def broken(size): raise ValueError("our own")
    monkeypatch.setitem(contestants, "broken", benchmark.Contestant(broken, "GRU"))
    with pytest.raises(ValueError, match="our own"): benchmark.race(TINY, ["broken"], 0)

def test_everybody_is_measured_beside_somebody_in_the_same_suite():
    for name, suite in benchmark.suites.items():
        if suite.kind == "times": assert {contestants[one].beside for one in suite.names} <= set(suite.names), name

@pytest.mark.parametrize("peer,cell", [("minGRU-pytorch", "minGRU"), ("torchrecurrent MGU", "MGU")])
def test_a_peer_has_as_many_weights_as_the_layer_beside_it(peer, cell):
    "Biases aside: what is compared multiplies as often."
    found = []
    for name in (peer, cell):
        made = []
        real = benchmark.torch_passes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark, "torch_passes", lambda module, *args: made.append(module) or real(module, *args))
            try: benchmark.start(name, Size(3, 2, 5, 5))
            except benchmark.Missing as why: pytest.skip(str(why))
        found.append(sum(p.numel() for p in made[0].parameters() if p.dim() > 1))
    assert found[0] == found[1]

def test_command(try_suite, tmp_path):
    path = tmp_path / "benchmark.json"
    call = lambda *line: CliRunner().invoke(cli.main, ["bench", *line], prog_name="gatednb")
    done = call("--budget", "quick", "--threads", "1", "--output", str(path))
    assert done.exit_code == 0, done.output
    assert "nn.GRU" in done.output and "GRU / nn.GRU" in done.output
    first = json.loads(path.read_text())
    assert first["surroundings"]["threads"] == 1 and len(first["rows"]) == 1
    call("--budget", "quick", "--threads", "1", "--output", str(path))
    assert json.loads(path.read_text())["rows"] == first["rows"]              # not measured twice
    first["surroundings"]["device"] = "another machine"
    path.write_text(json.dumps(first))
    call("--budget", "quick", "--threads", "1", "--output", str(path))
    assert json.loads(path.read_text())["rows"] != first["rows"]              # but another machine's do not count

@pytest.mark.parametrize("line,answer", {
    "--suite layer": "did you mean layers",
    "--budget fast": "full",
    "--threads 0": "--threads",
    "--threads two": "--threads",
    "--output .": "--output",
}.items())
def test_nonsense(line, answer):
    done = CliRunner().invoke(cli.main, ["bench", *line.split()], prog_name="gatednb")
    assert done.exit_code == 2 and answer in done.output and "Traceback" not in done.output

def test_a_file_that_is_no_benchmark_is_left_alone(try_suite, tmp_path):
    path = tmp_path / "benchmark.json"
    path.write_text("{}")
    done = CliRunner().invoke(cli.main, ["bench", "--budget", "quick", "--output", str(path)], prog_name="gatednb")
    assert done.exit_code == 2 and "no benchmark" in done.output and path.read_text() == "{}"

def test_a_process_that_dies_is_an_error_that_says_why(try_suite, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.allocators, "default", {"PYTHONPATH": str(tmp_path)})
    (tmp_path / "torch.py").write_text("raise SystemExit('no torch today')")
    done = CliRunner().invoke(cli.main, ["bench", "--budget", "quick"], prog_name="gatednb")
    assert done.exit_code == 1 and "no torch today" in done.output

def test_quick_rows_do_not_mix_with_full_ones(try_suite, tmp_path):
    path = tmp_path / "benchmark.json"
    for seconds, processes in ((.01, 1), (.02, 2), (.02, 2)):
        rows = benchmark.bench(path, ["try", "try"], processes, seconds, 1)["rows"]
        assert [row["seconds"] for row in rows] == [seconds] * processes and [row["process"] for row in rows] == [*range(processes)]

def test_recorded_benchmark_is_sound():
    "What the book shows has the first suite and memory at every size, and nothing of ours or PyTorch's missing."
    rows = benchmark.load(ROOT / "benchmarks" / "cpu.json")["rows"]
    for name, suite in benchmark.suites.items():
        assert name in cli.bench.epilog
        found = benchmark.rows_of({"rows": rows}, name)
        assert name not in ("layers", "memory") or list(found) == list(suite.sizes)
        assert all(len({row["process"] for row in of_size}) in (1, 2, 3) for of_size in found.values())
    lost = {name for suite in benchmark.suites for name in benchmark.missing({"rows": rows}, suite)}
    assert not lost - {*PEERS, "compiled loop GRU"}
    assert all(v > 0 for r in rows if isinstance(r["found"], dict) for t in r["found"].values() if isinstance(t, dict)
               for v in t.values()) and all(r["rate"] > 0 for r in rows)
