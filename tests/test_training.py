"""The training loop with the layers of this library: processes, precisions, replicas, interruptions."""
import math
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.testing import assert_close

from gatednb import GRU, LSTM, KAFGRU
from gatednb.sst import recall
from gatednb.training import Options, Run, Shuffled, Task, precisions

OPTIONS = Options(iterations=20, validate_every=5, learning_rate=1e-2)


class Reader(nn.Module):
    "A recurrent layer that reads a sequence, perhaps batch normalisation, and a read-out."
    def __init__(self, layer=GRU, norm=False):
        super().__init__()
        self.layer = layer(1, 8, batch_first=True)
        self.head = nn.Sequential(*[nn.BatchNorm1d(8)] * norm, nn.Linear(8, 1))

    def forward(self, inputs):
        return self.head(self.layer(inputs)[0][:, -1]).squeeze(-1)


class NormReader(Reader):
    def __init__(self): super().__init__(norm=True)


def sequences(number, seed):
    noise, positive = recall(10, number, torch.Generator().manual_seed(seed))
    return noise.transpose(0, 1), positive


def right(outputs, targets):
    return ((outputs > 0) == (targets > 0)).double()


TASK = Task(Shuffled(*sequences(320, 0), 32), sequences(100, 1), sequences(100, 2),
            nn.functional.binary_cross_entropy_with_logits, right)


def trained(make=Reader, seeds=(0, 1), options=OPTIONS, fabric=None, task=TASK):
    run = Run(make, task, seeds, options, fabric)
    for _ in run: pass
    return run


@pytest.fixture(autouse=True)
def one_thread():
    "These networks are too small to be shared."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double():
    "Everything in float64, also what comes out of a network."
    torch.set_default_dtype(torch.float64)
    yield replace(OPTIONS, precision="64-true")
    torch.set_default_dtype(torch.float32)


def train_in_processes(fabric, folder):
    "What each of several processes does; the files are read by the test."
    torch.set_num_threads(1)
    found = {}
    for make in Reader, NormReader:
        run = trained(make, fabric=fabric)
        run.save(folder / f"{make.__name__}.checkpoint")
        found[make.__name__] = {"best": run.best, "curves": run.curves, "result": run.finish()}
    torch.save(found, folder / f"{fabric.global_rank}.pt")


def test_two_processes_give_the_weights_of_one(tmp_path):
    "To rounding; with batch normalisation, which sees half a batch, they still agree with each other on the scores."
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(train_in_processes, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in first:
        assert first[name]["curves"] == second[name]["curves"] and first[name]["result"] == second[name]["result"]
    alone = trained(Reader)
    # a thousandth of what one step of the optimizer moves a weight
    for found in first["Reader"], second["Reader"]: assert_close(found["best"], alone.best, rtol=0, atol=1e-5)
    assert_close(first["Reader"]["curves"], alone.curves, rtol=1e-4, atol=0)
    resumed = Run(Reader, TASK, (0, 1), OPTIONS)
    resumed.load(tmp_path / "Reader.checkpoint")           # written by two processes, read by one
    assert resumed.iteration == 20 and resumed.curves == first["Reader"]["curves"]


class SecondOfThree(Fabric):
    "One process that takes itself for the second of three."
    world_size, global_rank = 3, 1
    def broadcast(self, obj, src=0): return torch.tensor([[7.], [8.]])


def test_all_processes_judge_by_the_numbers_of_the_first():
    run = Run(Reader, TASK, [4])
    run.fabric.__class__ = SecondOfThree
    assert run.evaluate(*run.valid) == (7, 8)


def test_each_process_takes_its_part_of_a_batch():
    run = Run(Reader, replace(TASK, batch=Shuffled(*sequences(320, 0), 30)), [4])
    inputs, targets = run.batch()
    run.fabric.__class__ = SecondOfThree
    part = run.batch()
    assert torch.equal(part[0], inputs[:, 1::3]) and torch.equal(part[1], targets[:, 1::3])
    run.task = TASK
    with pytest.raises(ValueError, match="batches of 32 examples; expected a multiple of 3"): run.batch()


@pytest.mark.parametrize("precision", precisions)
def test_every_precision_trains(precision):
    run = trained(options=replace(OPTIONS, iterations=100, precision=precision))
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert all(v.dtype == wanted for v in run.best.values() if v.is_floating_point())
    losses = torch.tensor(run.curves["train_loss"])
    assert losses.isfinite().all() and (losses[-1] < .9 * losses[0]).all()


def test_low_precision_is_used():
    "The losses of bf16-mixed differ from those of 32 bits by more than 32 bits explain."
    first, second = (torch.tensor(trained(options=replace(OPTIONS, precision=p)).curves["train_loss"])
                     for p in ("32-true", "bf16-mixed"))
    assert 1e-5 < (first - second).abs().max() < .1


def test_a_fabric_of_another_precision_is_refused():
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    with pytest.raises(ValueError, match="precision 64-true; expected 32-true"):
        Run(Reader, TASK, [0], OPTIONS, fabric)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layer", [GRU, KAFGRU, LSTM])
def test_replicas_equal_each_seed_alone(layer, norm, double):
    def make(): return Reader(layer, norm)
    together = trained(make, (0, 5, 2), double)
    for i, seed in enumerate((0, 5, 2)):
        alone = trained(make, [seed], double)
        assert_close({name: v[0] for name, v in alone.best.items()},
                     {name: v[i] for name, v in together.best.items()}, rtol=0, atol=1e-10)
        for curve in ("train_loss", "valid_loss", "valid_score"):
            assert_close([row[0] for row in alone.curves[curve]],
                         [row[i] for row in together.curves[curve]], rtol=0, atol=1e-10)


def test_replicas_that_stop_early_equal_each_seed_alone(double):
    options = replace(double, iterations=100, patience=15)
    together = trained(seeds=range(4), options=options)
    assert len(set(together.stopped.tolist())) > 1, "they must not all stop at once"
    result = together.finish()
    for i in range(4):
        alone = trained(seeds=[i], options=options)
        assert (alone.stopped, alone.best_iteration) == (together.stopped[i], together.best_iteration[i])
        assert_close(alone.finish()["test_loss"][0], result["test_loss"][i], rtol=1e-9, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_resumed_is_uninterrupted_bit_by_bit(seeds, optimizer, tmp_path):
    "Also with a schedule, batch normalisation and, for a single seed, dropout."
    class Net(NormReader):
        def forward(self, inputs):
            return super().forward(nn.functional.dropout(inputs, .2, self.training and len(seeds) == 1))
    options = replace(OPTIONS, optimizer=optimizer, schedule="cosine", warmup=4)
    whole = trained(Net, seeds, options)
    for interrupted in Run(Net, TASK, seeds, options):
        if interrupted.iteration == 10: break
    interrupted.notes["started"] = "on a Monday"
    interrupted.save(tmp_path / "checkpoint")
    torch.randn(7)                                         # the world went on in between
    resumed = Run(Net, TASK, seeds, options)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.notes == interrupted.notes and resumed.seconds == interrupted.seconds
    assert torch.equal(resumed.stopped, interrupted.stopped)
    for _ in resumed: pass
    for name in whole.best: assert torch.equal(resumed.best[name], whole.best[name]), name
    for a, b in zip(resumed.replicas.parameters(), whole.replicas.parameters()): assert torch.equal(a, b)
    assert resumed.curves == whole.curves and resumed.finish() == whole.finish()


def test_a_checkpoint_holds_nothing_but_data(tmp_path):
    run = trained()
    run.notes["started"] = "2026-01-01"
    run.save(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["seeds"] == [0, 1] and saved["progress"]["notes"] == {"started": "2026-01-01"}


def test_a_checkpoint_of_other_seeds_changes_nothing(tmp_path):
    trained(seeds=[0, 1]).save(tmp_path / "checkpoint")
    for seeds in ([1, 0], [0], [0, 1, 2]):
        run = Run(Reader, TASK, seeds, OPTIONS)
        before = {name: v.clone() for name, v in run.best.items()}
        with pytest.raises(ValueError, match=r"seeds \[0, 1\]"): run.load(tmp_path / "checkpoint")
        assert run.iteration == 0
        assert all(torch.equal(v, before[f"{name.split('stacked.')[-1]}"])
                   for name, v in run.replicas.named_parameters())


def test_nan_stops_its_replica_only(double):
    def damaged(seed, iteration):
        inputs, targets = TASK.batch(seed, iteration)
        return inputs * (math.nan if seed == 1 and iteration == 7 else 1), targets
    broken = trained(seeds=[0, 1, 2], options=double, task=replace(TASK, batch=damaged))
    sound = trained(seeds=[0, 1, 2], options=double)
    assert broken.diverged.tolist() == [False, True, False]
    assert broken.stopped.tolist() == [20, 10, 20] and broken.best_iteration[1] == 5
    for name, value in broken.best.items():
        assert value[1].isfinite().all()
        assert_close(value[[0, 2]], sound.best[name][[0, 2]], rtol=0, atol=1e-10)
    result = broken.finish()
    assert all(map(math.isfinite, result["test_loss"]))


def test_all_diverged_ends_the_run():
    run = trained(options=replace(OPTIONS, iterations=1000),
                  task=replace(TASK, batch=lambda *_: (torch.full((32, 10, 1), math.nan), torch.zeros(32))))
    assert run.iteration == 5 and run.diverged.all() and run.last_iteration == 5
    assert run.best_score.tolist() == [-math.inf] * 2
