"The experiment of `tiny_experiment`, and traps for its workers: files called SEED-ITERATION-WHAT, each sprung once."
import os, signal
from dataclasses import replace
from pathlib import Path

import tiny_experiment
from gatednb.trials import experiments, register_experiment

def task():
    known = tiny_experiment.task()
    def batch(seed, iteration):
        traps = Path(os.environ["TINY_TRAPS"])
        (traps / f"seen-{seed}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"), encoding="utf-8")
        for trap in sorted(traps.glob(f"{seed}-{iteration}-*")):
            trap.unlink()
            if trap.name.endswith("raise"): raise RuntimeError("a trap for the trial")
            os.kill(os.getpid(), signal.SIGKILL)
        return known.batch(seed, iteration)
    return replace(known, batch=batch)

register_experiment(replace(experiments["tiny"], name="trapped", task=task))
