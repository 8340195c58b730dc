"Trials survive what happens to programs that run for hours: kills, full disks, fingers that slip."
import errno, functools, json, os, pty, re, resource, shutil, signal, subprocess, sys, termios, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from conftest import ROOT

import tiny_experiment
from gatednb import evidence, trials
from gatednb.jobs import Worker, grouped, run_local
from gatednb.training import Options, Run, Task
from gatednb.trials import find_experiment, make_trials, opened, result_path, run_trials

HERE = Path(__file__).parent
SAME = ("configuration", "status", "curves", "gates", "gradients", "learned")    # parts of a result that no clock decides on

@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    "Processes find the experiment of these tests, and all use one thread, on which the last digit may depend."
    monkeypatch.setenv("GATEDNB_EXPERIMENTS", "tiny_experiment")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def tiny(*seeds, budget="quick", **changes):
    return make_trials("tiny", ["gru"], seeds or [0], budget, **changes)

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The results of two trials that nothing happened to, and their folder."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, [run_trials([trial], folder)[0] for trial in tiny(0, 1)]

def essence(result):
    "What must be the same however a trial was interrupted."
    timed = {"milliseconds_per_iteration"}
    return {part: result[part] for part in SAME} | {k: v for k, v in result["metrics"].items() if k not in timed}

def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())

def never(*_):
    raise AssertionError("a finished trial was trained")

def test_a_finished_trial_is_skipped(whole):
    folder, results = whole
    written = lambda: {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    before = written()
    assert run_trials(tiny(0, 1), folder, report=never) == results
    assert run_local(grouped(tiny(0, 1)), folder) == []
    assert written() == before

def test_options_are_written_as_they_are(tmp_path):
    "Measured numbers are rounded; a rounded option would make it another trial's result."
    trial, = tiny(0, learning_rate=1 / 300, iterations=25)
    result, = run_trials([trial], tmp_path)
    assert result["configuration"]["options"]["learning_rate"] == 1 / 300
    assert run_trials([trial], tmp_path, report=never) == [result]

# --- kills

DYING = """
import os, signal, sys
from pathlib import Path
from gatednb.trials import make_trials, run_trials
def report(iteration, last, score):
    if iteration == 75: os.kill(os.getpid(), signal.SIGKILL)
run_trials(make_trials("tiny", ["gru"], [0], "quick"), Path(sys.argv[1]), report=report, save_every=0)
"""

def process_environment():
    return os.environ | {"PYTHONPATH": f"{HERE}:{ROOT}"}

def test_killed_and_resumed_as_if_never_interrupted(whole, tmp_path):
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path], env=process_environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [Path(name).suffix for name in names(tmp_path)] == [".checkpoint"]
    seen = []
    resumed, = run_trials(tiny(0), tmp_path, report=lambda iteration, *_: seen.append(iteration))
    assert seen[0] == 50                                  # the last checkpoint before the kill
    assert essence(resumed) == essence(whole[1][0])
    assert names(tmp_path) == [f"{tiny(0)[0].name}.json"]

def test_a_killed_worker_is_reported_and_the_others_go_on(tmp_path, capfd):
    problems = run_local(grouped(tiny(0, 1, budget="killed")), tmp_path, jobs=2)
    assert len(problems) == 1 and "seed 1" in problems[0] and "SIGKILL" in problems[0]
    assert "seed 1: its process ended without a result (SIGKILL)" in capfd.readouterr().out
    assert [r["configuration"]["seed"] for r in evidence.load_results("tiny", folder=tmp_path)] == [0]

class Command:
    "`gatednb run`, with a terminal for its progress bars, in a process group of its own."
    def __init__(self, folder):
        self.seen, (self.terminal, other) = "", pty.openpty()
        termios.tcsetwinsize(other, (40, 120))            # lines and columns; a bar of no columns is not drawn
        command = [Path(sys.executable).parent / "gatednb", "run", "tiny", "--budget", "slow", "--jobs", "2", "--results", folder]
        self.process = subprocess.Popen(command, env=process_environment(), stdout=other, stderr=other, start_new_session=True)
        os.close(other)
    def read(self, until=None):
        "Read what it writes, to the end or until a pattern was seen for both seeds."
        while until is None or not all(re.search(until.format(seed), self.seen) for seed in (0, 1)):
            try: found = os.read(self.terminal, 10_000)
            except OSError: break                         # it has ended
            self.seen += found.decode(errors="replace")
        return self.seen
    def end(self):
        "Its exit code; waits until the last of its processes has closed the terminal, so that nobody is left behind."
        self.read()
        os.close(self.terminal)
        return self.process.wait(60)

def test_a_process_stopped_before_it_can_listen_is_said_to_be_stopped(tmp_path, capfd):
    worker = Worker(tiny(0), tmp_path, "cpu", 1, 60.)
    worker.process.terminate()
    while worker.receive(): pass
    assert worker.outcome == ("done", None)

def test_interrupted_twice_and_finished_by_the_same_command(whole, tmp_path):
    BAR = r"seed {}: +\d+%.*?[1-9]\d*/150 \[\d\d:\d\d<\d\d:\d\d"         # beyond iteration 0, and says how long it will take
    for number in signal.SIGINT, signal.SIGTERM:
        command = Command(tmp_path)
        command.read(until=BAR)
        os.killpg(command.process.pid, number)
        if number == signal.SIGTERM:                      # some programs send it twice; that is not pressing Ctrl-C again
            time.sleep(.4)
            os.killpg(command.process.pid, number)
        assert command.end() == 130 and command.seen.count(": stopped") == 2, command.seen
        assert "The same command goes on from here" in command.seen and "Traceback" not in command.seen
        assert [Path(name).suffix for name in names(tmp_path)] == 2 * [".checkpoint"]
    command = Command(tmp_path)
    assert command.end() == 0, command.seen
    found = evidence.load_results("tiny", folder=tmp_path)
    for result, one in zip(found, whole[1], strict=True):
        assert essence(result) | {"configuration": 0} == essence(one) | {"configuration": 0}
    assert len(names(tmp_path)) == 2

def test_processes_whose_parent_was_killed_save_and_end(tmp_path):
    command = Command(tmp_path)
    command.read(until=r"seed {}: +\d+%.*?[1-9]\d*/150")
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.end() == -signal.SIGKILL
    assert [Path(name).suffix for name in names(tmp_path)] == 2 * [".checkpoint"]

# --- damaged files

def edited(text): return re.sub(r'("test_accuracy": )[\d.]+', r"\g<1>0.123", text)
def cut_off(text): return text[:len(text) // 2]
def not_a_number(text): return re.sub(r'("test_loss": )[\d.]+', r"\g<1>NaN", text)
def renamed(text): return text.replace("\n", "")          # the content is right; the name is made wrong below

@pytest.mark.parametrize("damage", [edited, cut_off, not_a_number, renamed])
def test_a_damaged_result_is_left_out_and_run_again(whole, tmp_path, damage):
    folder, results = whole
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    path, other = (result_path(trial, tmp_path) for trial in tiny(0, 1))
    damaged = damage((other if damage is renamed else path).read_text())
    path.write_text(damaged)
    with pytest.warns(UserWarning, match=f"left out: .*{path.name}"):
        assert evidence.load_results("tiny", folder=tmp_path) == results[1:]
    with pytest.warns(UserWarning, match="the trial is run again"):
        again, = run_trials(tiny(0), tmp_path)
    assert essence(again) == essence(results[0])
    assert path.with_suffix(".1.damaged").read_text() == damaged
    assert len(evidence.load_results("tiny", folder=tmp_path)) == 2

def test_a_result_in_another_experiments_folder_is_left_out(whole, tmp_path):
    shutil.copytree(whole[0] / "tiny", tmp_path / "rmnist")
    with pytest.warns(UserWarning, match="moved"): assert evidence.load_results("rmnist", folder=tmp_path) == []

@pytest.mark.parametrize("damage", [lambda content: content[:2000], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_checkpoint_starts_anew(whole, tmp_path, damage):
    assert run_trials(tiny(0), tmp_path, stop=lambda: True) is None
    checkpoint, = tmp_path.rglob("*.checkpoint")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    seen = []
    with pytest.warns(UserWarning, match="cannot be read.*starts anew"):
        result, = run_trials(tiny(0), tmp_path, report=lambda iteration, *_: seen.append(iteration))
    assert seen[0] == 0 and essence(result) == essence(whole[1][0])

def test_a_checkpoint_of_other_code_goes_on_and_says_so(whole, tmp_path, monkeypatch):
    assert run_trials(tiny(0), tmp_path, stop=lambda: True) is None
    before = trials.code_version()
    monkeypatch.setattr(trials, "code_version", lambda: before | {"sources": "another"})
    with pytest.warns(UserWarning, match="written by other code"): result, = run_trials(tiny(0), tmp_path)
    made = result["provenance"]
    assert made["code"]["sources"] == "another" and made["earlier_code"] == [before]
    assert "earlier_code" not in whole[1][0]["provenance"] and essence(result) == essence(whole[1][0])

def test_drafts_of_killed_saves_go_with_the_checkpoint(tmp_path):
    assert run_trials(tiny(0), tmp_path, stop=lambda: True) is None
    checkpoint, = tmp_path.rglob("*.checkpoint")
    checkpoint.with_name(f"{checkpoint.name}.12345.draft").write_bytes(b"half")
    run_trials(tiny(0), tmp_path)
    assert len(names(tmp_path)) == 1

# --- disks

def test_an_unwritable_folder_is_found_out_before_training(tmp_path, whole):
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(OSError, match=re.escape(str(tmp_path)) + ".*could not be written"):
        run_trials(tiny(0), tmp_path / "results", report=never)
    problems = run_local(grouped(tiny(0)), tmp_path / "results")
    assert len(problems) == 1 and "could not be written" in problems[0]
    assert names(tmp_path) == ["results"]

class SmallDisk:
    "Within, no file can grow beyond so many bytes: the operating system refuses, as a full disk does."
    def __init__(self, size): self.size = size
    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))
    def __exit__(self, *_): resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

@pytest.mark.parametrize("every, size, what", [(0., 2000, "checkpoint"), (60., 2000, "json")])
def test_a_full_disk_ends_the_trial_and_leaves_nothing_half_written(whole, tmp_path, every, size, what):
    with SmallDisk(size), pytest.raises(OSError, match=rf"\.{what} could not be written .*nothing was left half-written") as caught:
        run_trials(tiny(0), tmp_path, save_every=every)
    assert caught.value.errno == errno.EFBIG and names(tmp_path) == []
    assert essence(run_trials(tiny(0), tmp_path)[0]) == essence(whole[1][0])           # there is room again

def test_a_disk_that_fills_up_keeps_what_was_there(whole, tmp_path, monkeypatch):
    assert run_trials(tiny(0), tmp_path, stop=lambda: True) is None
    def full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: full(file) if ".json" in os.readlink(f"/proc/self/fd/{file}") else real(file))
    with pytest.raises(OSError, match="No space left on device"): run_trials(tiny(0), tmp_path)
    assert [Path(name).suffix for name in names(tmp_path)] == [".checkpoint"]          # the next call goes on from there
    monkeypatch.undo()
    assert essence(run_trials(tiny(0), tmp_path)[0]) == essence(whole[1][0])

# --- divergence and replicas

def test_divergence_is_recorded_skipped_and_counted(tmp_path):
    found = [run_trials([trial], tmp_path)[0] for trial in tiny(0, 1, budget="broken")]
    assert [r["status"] for r in found] == ["finished", "diverged"]
    assert found[1]["metrics"]["iterations"] == 50 and found[1]["metrics"]["test_accuracy"] is None
    assert run_trials(tiny(0, 1, budget="broken"), tmp_path, report=never) == found
    row, = evidence.summary(evidence.load_results("tiny", folder=tmp_path)).to_dict("records")
    assert [row["n"], row["diverged"], row["mean"]] == [2, 1, found[0]["metrics"]["test_accuracy"]]

def close(one, other):
    "Equal but for the last of the five digits that are written."
    if isinstance(one, dict): return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list): return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1.01e-4, abs=1e-12) if isinstance(one, float) else one == other

def test_replicas_are_what_each_is_alone(tmp_path):
    one_by_one = tiny(0, 1, 4, budget="broken", precision="64-true", patience=25)
    together = run_trials(one_by_one, tmp_path / "together")
    alone = [run_trials([trial], tmp_path / "alone")[0] for trial in one_by_one]
    assert [r["status"] for r in together] == ["finished", "diverged", "finished"]
    assert [r["metrics"]["iterations"] for r in together] == [100, 50, 50]             # gates are looked at at 50 and at 100
    for one, other in zip(together, alone): assert close(essence(one), essence(other))

# --- size

LONG = 1_000_000 // 25      # validations of the longest training that the paper's protocol allows

@pytest.mark.parametrize("gate", ["kaf_gru", "gru_rr"])
def test_files_are_small_after_the_longest_training(gate):
    trial, = make_trials("rmnist", [gate], [0])
    inputs, labels = torch.rand(20, 55, 28), torch.randint(10, (20,))       # 55 is the length with most gradients kept
    task = Task(lambda seed, i: (inputs, labels), (inputs, labels), (inputs, labels),
                torch.nn.functional.cross_entropy, lambda outputs, targets: (outputs.argmax(-1) == targets).double())
    run = Run(functools.partial(find_experiment("rmnist").network, gate), task, [0], replace(trial.options, iterations=1))
    trials.look(run)
    for _ in run: pass
    one = run.notes["seeds"][0]
    for k in range(LONG.bit_length()):
        run.iteration = run.stopped[0] = 25 * 2**k
        trials.look(run)
    run.iteration = run.stopped[0] = 25 * LONG
    run.curves = {"iteration": list(range(25, 25 * LONG + 1, 25))} | {
        name: [[-1.23456789e-5 / k] for k in range(1, LONG + 1)] for name in run.curves if name != "iteration"}
    metrics = run.finish()
    trials.look(run, final=True)
    found = trials.outcome(trial, run, 0, metrics) | {"provenance": trials.provenance(torch.device("cpu"))}
    assert len(found["gates"]["iteration"]) == 18
    text = trials.sealed(trials.fitted(trials.rounded(found)))
    assert len(text) <= 20_000
    assert len(json.loads(text)["curves"]["iteration"]) > 40

def test_workers_load_nothing_for_pages():
    "A process that trains starts in seconds: what draws and tabulates stays out."
    for_pages = {"matplotlib", "seaborn", "pandas", "scipy", "IPython", "ray"}
    code = f"import gatednb.jobs, gatednb.sequential_mnist, sys; print(*({for_pages!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

def test_odd_entries_do_not_hide_the_others(whole, tmp_path):
    folder, results = whole
    shutil.copytree(folder, tmp_path / "results")
    (tmp_path / "results/tiny/folder.json").mkdir()
    (tmp_path / "results/tiny/bytes.json").write_bytes(bytes(range(256)))
    with pytest.warns(UserWarning, match="left out") as said:
        assert evidence.load_results("tiny", folder=tmp_path / "results") == results
    assert len(said) == 2 and all(len(str(warning.message)) < 300 for warning in said)
