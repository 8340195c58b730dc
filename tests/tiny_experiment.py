"An experiment that takes seconds, for the tests of trials: to say whether a sequence of noise began with +1 or with -1."
import functools, math, os, signal, time

import torch
from torch import nn

from gatednb.layers import GRU
from gatednb.sst import recall
from gatednb.training import Options, Task
from gatednb.trials import Budget, Experiment, register_experiment

class Reader(nn.Module):
    def __init__(self, gate):
        super().__init__()
        gate = "sigmoid" if gate == "gru" else gate
        self.layer = GRU(1, 8, batch_first=True, reset_gate=gate, update_gate=gate)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs):
        return self.head(self.layer(inputs)[0][:, -1]).squeeze(-1)

def examples(number, seed):
    sequences, positive = recall(10, number, torch.Generator().manual_seed(seed))
    return sequences.transpose(0, 1), positive

def right(outputs, targets):
    return ((outputs > 0) == (targets > .5)).double()

def batch(pause, killed, broken, seed, iteration):
    time.sleep(pause)
    inputs, targets = examples(32, 1_000_000 * (seed + 1) + iteration)
    if seed == killed and iteration == 60: os.kill(os.getpid(), signal.SIGKILL)
    return inputs * (math.nan if seed == broken and iteration >= 30 else 1), targets

def task(pause=0., killed=None, broken=None):    # seconds an iteration; seed whose process is killed; seed whose inputs break
    return Task(functools.partial(batch, pause, killed, broken), examples(200, 0), examples(500, 1),
                nn.functional.binary_cross_entropy_with_logits, right)

options = Options(iterations=150, learning_rate=1e-2)
register_experiment(Experiment("tiny", "the first of ten numbers", task, Reader, ("gru",), {
    "quick": Budget("150 iterations", options, seeds=2),
    "slow": Budget("150 iterations, slowly", options, {"pause": .04}, seeds=2),
    "killed": Budget("150 iterations; the process of seed 1 is killed", options, {"killed": 1}, seeds=3),
    "broken": Budget("150 iterations; the inputs of seed 1 break", options, {"broken": 1}, seeds=3)}))
