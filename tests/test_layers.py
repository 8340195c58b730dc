"""What must hold across chapters: parity with torch.nn, and every gate in every slot of every cell."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import gatednb
from gatednb import GRU, LSTM, MGU, KAFGRU, RefinedGRU, RefinedLSTM, RefinedMGU, SSTGRU, catalogue

PAPERS = {"SSTGRU": SSTGRU, "KAFGRU": KAFGRU, "RefinedGRU": RefinedGRU, "RefinedMGU": RefinedMGU, "RefinedLSTM": RefinedLSTM}
SLOTS = [(layer, slot) for layer, slots in ((GRU, ("reset_gate", "update_gate", "candidate")),
                                            (LSTM, ("input_gate", "forget_gate", "output_gate", "candidate")),
                                            (MGU, ("gate", "reset_gate", "update_gate", "candidate"))) for slot in slots]


def tensors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(layer=st.sampled_from([(GRU, nn.GRU), (LSTM, nn.LSTM)]), sizes=st.tuples(*[st.integers(1, 7)] * 4), bias=st.booleans(),
       batch_first=st.booleans(), batched=st.booleans(), initial=st.booleans(), seed=st.integers(0, 99))
def test_defaults_are_torch(layer, sizes, bias, batch_first, batched, initial, seed):
    "Outputs, final states and all gradients equal torch.nn's in float64, whatever the arguments."
    (time, batch, features, hidden), (ours, theirs) = sizes, layer
    torch.manual_seed(seed)
    a = ours(features, hidden, bias=bias, batch_first=batch_first, dtype=torch.float64)
    torch.manual_seed(seed)
    b = theirs(features, hidden, bias=bias, batch_first=batch_first, dtype=torch.float64)
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    shape = ((batch, time) if batch_first else (time, batch)) if batched else (time,)
    x = tensors(*shape, features, seed=seed).requires_grad_()
    state = tensors(*((1, batch) if batched else (1,)), hidden, seed=seed + 1)
    hx = None if not initial else state if ours is GRU else (state, 2 * state)
    results = []
    for module in (a, b):
        outputs, final = module(x, hx)
        loss = outputs.sin().sum() + sum(f.cos().sum() for f in (final if isinstance(final, tuple) else (final,)))
        results.append([outputs, final, torch.autograd.grad(loss, [x, *module.parameters()])])
    assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(catalogue))
@pytest.mark.parametrize("layer,slot", SLOTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_gradcheck_of_every_gate_in_every_slot(layer, slot, name):
    "Gradients by input, state, weights and gate parameters equal finite differences."
    torch.manual_seed(0)
    module = layer(3, 3, dtype=torch.float64, allow_unbounded=True, **{slot: name})
    names, values = zip(*module.named_parameters())
    states = [tensors(1, 2, 3, seed=i + 1) for i in range(len(module.cell.states))]
    # a corner of the gate on the path of a finite difference would make it wrong: these inputs stay clear of them
    inputs = [tensors(3, 2, 3), *states, *(v.detach().clone() for v in values)]
    def run(x, *rest):
        hx, weights = rest[:len(states)], dict(zip(names, rest[len(states):]))
        return torch.func.functional_call(module, weights, (x, hx if len(hx) > 1 else hx[0]))[0]
    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in inputs])


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_models_of_the_papers_survive_large_inputs(name):
    "Inputs of ±1e4 give finite outputs and gradients in float32."
    torch.manual_seed(0)
    module = PAPERS[name](4, 4)
    x = (1e4 * torch.randn(5, 3, 4)).requires_grad_()
    outputs = module(x)[0]
    assert outputs.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs.sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_refused_call_changes_nothing(name):
    "An error leaves weights, gradients and the random state as they were."
    torch.manual_seed(0)
    module = PAPERS[name](4, 4)
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    for bad in (torch.zeros(2, 3, 5), torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(4), torch.zeros(0, 3, 4)):
        with pytest.raises((ValueError, RuntimeError)): module(bad)
    with pytest.raises(ValueError): PAPERS[name](4, 4, candidate="sigmiod")
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in module.parameters())


def test_the_library_imports_only_what_it_needs():
    "A user without the book's packages can import everything that __init__ offers."
    code = ("import sys, gatednb; heavy = {'matplotlib', 'seaborn', 'pooch', 'nbdev', 'fastcore', 'IPython', 'sklearn', 'sphinx'}; "
            "print(sorted(heavy & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_documented():
    "Docstrings everywhere, and a comment for each parameter of what the library offers at its top."
    for name in (n for n in dir(gatednb) if not n.startswith("_")):
        thing = getattr(gatednb, name)
        if callable(thing) or isinstance(thing, type): assert thing.__doc__, f"{name} has no docstring"
