"A sweep on Ray, with everything that happens to workers: killed once, killed too often, an error of the trial's own."
import os, subprocess, sys
from pathlib import Path

import pytest, torch

os.environ.setdefault("RAY_AUTH_MODE", "token")        # read when Ray is imported
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster

from gatednb.cluster import connected, run_on_ray
from gatednb.jobs import grouped, run_local
from gatednb.trials import make_trials, opened, result_path, run_trials

RETRIES = 1
TRAPS = ("0-60-kill",                    # dies once, in the middle
         "1-30-raise",                   # raises an error
         "2-10-kill", "2-20-kill",       # dies as often as it is started
         "3-0-raise",                    # is finished: must not be trained again
         "4-10-raise")                   # has a checkpoint behind it: must not begin anew

@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    "What workers find: experiments, traps, one thread."
    traps = tmp_path_factory.mktemp("traps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEDNB_EXPERIMENTS", "tiny_cluster_experiment")
        patch.setenv("TINY_TRAPS", str(traps))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield traps
        torch.set_num_threads(threads)

def trials(*seeds):
    return make_trials("trapped", ["gru"], seeds, "quick")

@pytest.fixture(scope="module")
def sweep(surroundings, tmp_path_factory):
    "Five trials on a cluster of two workers that share a GPU, in name: folder, problems, GPUs seen, traps left."
    folder, asked = tmp_path_factory.mktemp("results"), iter([False, False, True])
    run_trials(trials(3), folder)
    assert run_trials(trials(4), folder, stop=lambda: next(asked)) is None
    assert list(folder.rglob("*.checkpoint"))
    for trap in TRAPS: (surroundings / trap).touch()
    (surroundings / "seen-3").unlink()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    try: problems = run_on_ray(grouped(trials(*range(5))), folder, address=cluster.address, gpus=.5, retries=RETRIES)
    finally: cluster.shutdown()
    seen = {path.name: path.read_text(encoding="utf-8") for path in surroundings.glob("seen-*")}
    left = {path.name for path in surroundings.glob("*-*-*")}
    for trap in left: (surroundings / trap).unlink()
    return folder, problems, seen, left

def essence(result):
    "A result without what a clock decides on."
    timed = result["metrics"] | {"milliseconds_per_iteration": None}
    return {part: result[part] for part in ("configuration", "status", "curves", "gates", "learned")} | {"metrics": timed}

def test_every_trial_has_one_result_equal_to_the_local_one(sweep, tmp_path):
    folder, *_ = sweep
    files = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert files == sorted(result_path(trial, folder).name for trial in trials(0, 3, 4))
    assert run_local(grouped(trials(0)), tmp_path, jobs=os.cpu_count()) == []      # one thread for each
    run_trials(trials(4), tmp_path)                                                # what it calls
    for trial in trials(0, 4):
        assert essence(opened(result_path(trial, folder))) == essence(opened(result_path(trial, tmp_path)))

def test_what_failed_is_reported_and_nothing_else(sweep):
    assert sorted(sweep[1]) == ["trapped/gru (quick) seed 1: RuntimeError: a trap for the trial",
                                "trapped/gru (quick) seed 2: its worker died, and 1 more in its place"]

def test_the_killed_were_killed_and_others_did_not_begin_anew(sweep):
    assert sweep[3] == {"3-0-raise", "4-10-raise"}

def test_workers_get_a_share_of_the_gpu(sweep):
    assert sweep[2] == {f"seen-{seed}": "0" for seed in (0, 1, 2, 4)}

def test_more_gpus_than_there_are():
    with pytest.raises(ValueError, match="gpus is 99; expected at most"):
        with connected(gpus=99): pass
    assert not ray.is_initialized()

def test_without_ray_the_error_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['ray'] = None\nfrom gatednb.cli import main\nmain(sys.argv[1:])"
    environment = os.environ | {"GATEDNB_EXPERIMENTS": "tiny_experiment", "PYTHONPATH": str(Path(__file__).parent)}
    command = ["run", "tiny", "--budget", "quick", "--engine", "ray", "--results", tmp_path]
    done = subprocess.run([sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: Ray is not installed: pip install 'gatednb[cluster]'\n"
