"The command as others call it: exit codes, answers to nonsense, what stands in the README."
import os, re, shlex, subprocess, sys, warnings
from pathlib import Path

import pytest, torch
from click.testing import CliRunner
from conftest import ROOT

from gatednb import cli, jobs
from gatednb.trials import make_trials, result_path, run_trials

def call(line, *arguments):
    return CliRunner().invoke(cli.main, [*shlex.split(line), *map(str, arguments)], prog_name="gatednb")

@pytest.fixture(scope="module", autouse=True)
def surroundings():
    "The experiment of these tests is known, here and in other processes, which use one thread."
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEDNB_EXPERIMENTS", "tiny_experiment")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(Path(__file__).parent)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Results of two gates, three seeds each, and one seed with another option."
    folder = tmp_path_factory.mktemp("results")
    for gate in ("gru", "squared_sigmoid"): run_trials(make_trials("tiny", [gate], range(3), "quick"), folder)
    run_trials(make_trials("tiny", ["gru"], [0], "quick", learning_rate=.02), folder)
    return folder

NONSENSE = {
    "rum tiny": "Did you mean 'run'?",
    "run tyni": "did you mean tiny",
    "run tiny --gate sigmiod": "did you mean sigmoid",
    "run tiny --budget quikc": "did you mean quick?",
    "run tiny --set learning_rat=.1": "did you mean learning_rate?",
    "run tiny --set optimizer=adm": "did you mean adam",
    "run tiny --set seeds=3": "option is 'seeds'",
    "run tiny --set patience": "expected NAME=VALUE",
    "run tiny --set patience=": "patience is ''",
    "run tiny --set iterations=many": "iterations is 'many'",
    "run tiny --set iterations=1e3": "iterations is 1000.0; expected an int",
    "run tiny --set learning_rate=nan": "learning_rate is nan",
    "run tiny --set clip_norm=-1": "clip_norm is -1",
    "run tiny --gates gru": "--gate",
    "run tiny --seeds ''": "1 to 10,000",
    "run tiny --seeds 0": "1 to 10,000",
    "run tiny --seeds=-1": "1 to 10,000",
    "run tiny --seeds 5-3": "1 to 10,000",
    "run tiny --seeds 1,,2": "1 to 10,000",
    "run tiny --seeds 1.5": "1 to 10,000",
    "run tiny --seeds 999999999": "1 to 10,000",
    "run tiny --jobs 0": "--jobs",
    "run tiny --jobs=-2": "--jobs",
    "run tiny --replicas 0": "--replicas",
    "run tiny --device gpu": "--device",
    "run tiny --engine slurm": "--engine",
    "run tiny --gpus .5": "--engine is local; expected ray, which --gpus is for",
    "run tiny --address a:1 --retries 1": "which --address, --retries is for",
    "run tiny --engine ray --gpus=-1": "--gpus",
    "run tiny --engine ray --retries=-1": "--retries",
    "run tiny --seeds 9 --engine ray --address nowhere": "expected HOST:PORT",
    "run": "EXPERIMENT",
    "show tyni": "did you mean tiny",
    "show tiny --budget quikc": "did you mean quick?",
    "show tiny --results no/such/folder": "no/such/folder",
    "compare tiny/gru/quick": "SECOND",
    "compare tiny tiny/gru": "'tiny' is no name",
    "compare tiny/gru/quick tiny/sigmoid/quick": "tiny/squared_sigmoid/quick",
    "compare tiny/gru tiny/squared_sigmoid": "there are no results of tiny/gru/full; there are tiny/gru/quick,",
    "compare tiny/gru/quick tiny/squared_sigmoid/quick --metric test_acuracy": "test_accuracy",
}

@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_is_answered_and_nothing_is_trained(line, folder, monkeypatch):
    monkeypatch.setenv("GATEDNB_RESULTS", str(folder))
    monkeypatch.setattr(jobs, "run_local", None)
    quick = "--budget quick" * (line.startswith("run tiny") and "--budget" not in line)
    found = call(f"{line} {quick}")
    assert found.exit_code == 2 and NONSENSE[line] in found.stderr and "Traceback" not in found.output, found.output
    assert found.stderr.splitlines()[-1].startswith("Error: ") and not found.stdout

def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    found = call("run tiny --budget quick --seeds 1 --results", tmp_path / "file" / "results")
    assert found.exit_code == 1 and "could not be written" in found.stderr and "Traceback" not in found.output

def test_a_trial_that_is_killed_is_reported_and_the_others_are_shown(tmp_path):
    found = call("run tiny --budget killed --seeds 1-2 --jobs 2 --results", tmp_path)
    assert found.exit_code == 1
    assert re.search(r"Not finished:\n    tiny/gru \(killed\) seed 1: .*SIGKILL", found.stderr)
    assert re.search(r"^ *gru +1 +0 ", found.stdout, re.MULTILINE)

def test_divergence_is_counted_in_the_table(tmp_path):
    assert len(run_trials(make_trials("tiny", ["gru"], range(3), "broken"), tmp_path)) == 3
    found = call("show tiny --results", tmp_path)
    assert found.exit_code == 0 and re.search(r"^ *gate +n +div .*\n *gru +3 +1 ", found.stdout, re.MULTILINE)

@pytest.mark.filterwarnings("default:left out")
@pytest.mark.parametrize("damage", [lambda text: text[:-100], lambda text: text.replace('"test_accuracy": ', '"test_accuracy": 1')])
def test_a_damaged_result_is_one_line_and_left_out(folder, damage):
    path = result_path(make_trials("tiny", ["gru"], [1], "quick")[0], folder)
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage(whole), encoding="utf-8")
    before = warnings.showwarning
    try: found = call("show tiny --results", folder)
    finally: path.write_text(whole, encoding="utf-8")
    assert found.exit_code == 0 and re.fullmatch(rf"warning: left out: {path}.*\n", found.stderr)
    assert re.search(r"^ *gru +2 +0 ", found.stdout, re.MULTILINE)
    assert warnings.showwarning is before

def test_budgets_stand_apart(folder):
    tables = call("show tiny --results", folder).stdout.split("\n\n")
    assert [table.split("\n")[0].split(":")[0] for table in tables] == [
        "the first of ten numbers", "budget quick", "budget quick+ learning_rate=0.02"]
    assert max(map(len, "\n".join(tables).splitlines())) <= 80
    assert call("show tiny --budget quick --results", folder).stdout.strip() == "\n\n".join(tables[:2])

def test_compare_says_what_follows(folder):
    found = call("compare tiny/gru/quick tiny/squared_sigmoid/quick --results", folder)
    assert found.exit_code == 0 and "3 paired seeds" in found.stdout and "squared_sigmoid" in found.stdout
    found = call("compare tiny/gru/quick 'tiny/gru/quick+ learning_rate=0.02' --results", folder)
    assert found.exit_code == 0 and "1 paired seed" in found.stdout

def test_nothing_there_yet(tmp_path):
    found = call("show tiny --results", tmp_path)
    assert found.exit_code == 0 and found.stdout == "tiny: no results yet; gatednb run tiny makes them.\n"

@pytest.mark.parametrize("engine", ["jobs.run_local", "cluster.run_on_ray"])
def test_stopped_by_ctrl_c(engine, monkeypatch, tmp_path):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(f"gatednb.{engine}", stop)
    found = call("run tiny --budget quick --engine", "ray" if "ray" in engine else "local", "--results", tmp_path)
    assert found.exit_code == 130 and found.stderr == "Stopped. The same command goes on from here.\n"

COMMAND = Path(sys.executable).parent / "gatednb"

def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    monkeypatch.delenv("GATEDNB_EXPERIMENTS")
    first = subprocess.run(f"{COMMAND} list | head -n 1", shell=True, capture_output=True, text=True)
    assert first.stdout.startswith("rmnist: ") and first.stderr == ""

def test_help_does_not_wait_for_what_it_does_not_need():
    program = "import sys\nfrom gatednb.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "compare" in done.stdout
    assert not {"pandas", "scipy", "lightning_fabric", "sklearn", "matplotlib", "ray", "numba"} & set(done.stderr.split())

def test_commands_of_the_readme_are_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^gatednb (.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"list", "run", "show", "compare"}
    for line in lines:
        name, *arguments = shlex.split(line)
        given = cli.main.commands[name].make_context(name, list(arguments)).params    # refuses an option that is not there
        if name == "run": assert make_trials(given["experiment"], given["gates"], given["seeds"], given["budget"])
