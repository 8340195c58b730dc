"""What must hold across chapters: parity with torch.nn, and every gate in every slot of every cell."""
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import gatednb
from gatednb import GRU, LSTM, MGU, GRUCell, LSTMCell, KAFGRU, RefinedGRU, RefinedLSTM, RefinedMGU, SSTGRU, catalogue

PAPERS = {"SSTGRU": SSTGRU, "KAFGRU": KAFGRU, "RefinedGRU": RefinedGRU, "RefinedMGU": RefinedMGU, "RefinedLSTM": RefinedLSTM}
SLOTS = [(layer, slot) for layer, slots in ((GRU, ("reset_gate", "update_gate", "candidate")),
                                            (LSTM, ("input_gate", "forget_gate", "output_gate", "candidate")),
                                            (MGU, ("gate", "reset_gate", "update_gate", "candidate"))) for slot in slots]


def tensors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {"GRU": (GRU, nn.GRU), "LSTM": (LSTM, nn.LSTM)}

@st.composite
def modules(draw):
    "Every argument of the constructors: our layer and torch.nn's after the same seed, and the arguments."
    kind, seed = draw(st.sampled_from(sorted(PAIRS))), draw(st.integers(0, 99))
    features, hidden = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    options = {"num_layers": draw(st.integers(1, 3)), "bias": draw(st.booleans()), "batch_first": draw(st.booleans()),
               "dropout": draw(st.sampled_from([0., .5, 1.])), "bidirectional": draw(st.booleans()), "dtype": torch.float64}
    if kind == "LSTM" and hidden > 1: options["proj_size"] = draw(st.integers(0, hidden - 1))
    found = []
    for module in PAIRS[kind]:
        torch.manual_seed(seed)
        with warnings.catch_warnings(action="ignore"): found.append(module(features, hidden, **options))
    return *found, kind, features, hidden, options

def batch(draw, features, first):
    "A batch in one of its forms: whole, without a batch axis, empty, packed in order or not; the leaf, and its batch axis."
    time, size, form = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.sampled_from(["whole", "single", "packed", "mixed"]))
    if form in ("packed", "mixed"): size = max(size, 1)
    shape = (time,) if form == "single" else (size, time) if first else (time, size)
    leaf = tensors(*shape, features).requires_grad_()
    if form in ("whole", "single"): return leaf, leaf, () if form == "single" else (size,)
    lengths = draw(st.lists(st.integers(1, time), min_size=size, max_size=size))
    lengths[0] = time
    if form == "packed": lengths.sort(reverse=True)
    return leaf, pack_padded_sequence(leaf, torch.tensor(lengths), first, enforce_sorted=form == "packed"), (size,)

@settings(max_examples=150, deadline=None)
@given(modules=modules(), data=st.data(), initial=st.booleans(), training=st.booleans())
def test_defaults_are_torch(modules, data, initial, training):
    "Names, initial weights, text, outputs, states, random numbers and all gradients are torch.nn's, whatever the arguments."
    ours, theirs, kind, features, hidden, options = modules
    assert str(ours) == str(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    leaf, x, size = batch(data.draw, features, options["batch_first"])
    runs, widths = options["num_layers"] * (1 + options["bidirectional"]), [options.get("proj_size") or hidden, hidden]
    states = [tensors(runs, *size, width, seed=i).requires_grad_() for i, width in enumerate(widths[:len(ours.cell.states)])]
    hx = None if not initial else tuple(states) if kind == "LSTM" else states[0]
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        outputs, final = module.train(training)(x, hx)
        final = final if kind == "LSTM" else (final,)
        values = outputs.data if isinstance(outputs, PackedSequence) else outputs
        loss = values.sin().sum() + sum(f.cos().sum() for f in final)
        found = torch.autograd.grad(loss, [leaf, *(states if initial else []), *module.parameters()], retain_graph=True,
                                    allow_unused=True, materialize_grads=True)
        results.append([outputs, final, found])
    assert_close(*results, rtol=1e-10, atol=1e-12)

BAD = {    # arguments of the constructor → as torch.nn
    "no features": ((0, 3), {}), "no units": ((3, 0), {}), "half a unit": ((3, 2.5), {}), "a word": (("3", 2), {}),
    "no level": ((3, 2, 0), {}), "half a level": ((3, 2, 1.5), {}), "bias": ((3, 2, 1, 2), {}), "order": ((3, 2), {"batch_first": 2}),
    "dropout above 1": ((3, 2, 2), {"dropout": 1.1}), "dropout is a bool": ((3, 2, 2), {"dropout": True}),
    "dropout is nothing": ((3, 2, 2), {"dropout": None}), "dropout is a word": ((3, 2, 2), {"dropout": "a"}),
    "projection too large": ((3, 2), {"proj_size": 2}), "projection below 0": ((3, 2), {"proj_size": -1}),
    "whole numbers": ((3, 2), {"dtype": torch.int32}), "a name": ((3, 2), {"hiden": 1}),
}

def raised(call):
    "The type of the error that a call raises, or None."
    with warnings.catch_warnings(action="ignore"):
        try: call()
        except Exception as error: return type(error)

@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("case", BAD)
def test_constructors_refuse_as_torch(kind, case):
    args, options = BAD[case]
    ours, theirs = (raised(lambda: module(*args, **options)) for module in PAIRS[kind])
    assert ours is theirs and ours is not None

CALLS = {    # of a layer with 3 features, 2 units, 2 levels; for an LSTM states come twice
    "a list": ([[1.]], None), "one axis": (torch.zeros(3), None), "four axes": (torch.zeros(4, 2, 3, 1), None),
    "features": (torch.zeros(4, 2, 4), None), "whole numbers": (torch.zeros(4, 2, 3).int(), None), "double": (torch.zeros(4, 2, 3).double(), None),
    "no steps": (torch.zeros(0, 2, 3), None), "state without a batch": (torch.zeros(4, 2, 3), torch.zeros(2, 2)),
    "state of a batch": (torch.zeros(4, 3), torch.zeros(2, 1, 2)), "another batch": (torch.zeros(4, 2, 3), torch.zeros(2, 3, 2)),
    "one level": (torch.zeros(4, 2, 3), torch.zeros(1, 2, 2)), "double state": (torch.zeros(4, 2, 3), torch.zeros(2, 2, 2).double()),
    "packed features": (pack_padded_sequence(torch.zeros(4, 2, 4), [4, 2]), None),
    "packed double": (pack_padded_sequence(torch.zeros(4, 2, 3).double(), [4, 2]), None),
    "packed state": (pack_padded_sequence(torch.zeros(4, 2, 3), [4, 2]), torch.zeros(2, 2)),
}

@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused_as_by_torch(kind, case):
    x, hx = CALLS[case]
    if kind == "LSTM" and hx is not None: hx = hx, hx
    ours, theirs = (raised(lambda: module(3, 2, 2)(x, hx)) for module in PAIRS[kind])
    if kind == "LSTM" and case in ("packed double", "packed state"):    # nn.LSTM does not check these, and fails inside
        theirs = raised(lambda: nn.GRU(3, 2, 2)(*CALLS[case]))
    assert ours is theirs and ours is not None

@pytest.mark.parametrize("hx", [torch.zeros(1, 2, 2), (torch.zeros(1, 2, 2),), 3 * (torch.zeros(1, 2, 2),), 2 * ([0.],)],
                         ids=["a tensor", "one", "three", "lists"])
def test_states_of_an_lstm_are_refused_as_by_torch(hx):
    ours, theirs = (raised(lambda: module(3, 2)(torch.zeros(4, 2, 3), hx)) for module in PAIRS["LSTM"])
    assert ours is theirs and ours is not None

CELLS = {"GRU": (GRUCell, nn.GRUCell), "LSTM": (LSTMCell, nn.LSTMCell)}

@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(CELLS)), sizes=st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 7)), bias=st.booleans(),
       batched=st.booleans(), initial=st.booleans(), seed=st.integers(0, 99))
def test_cells_are_torchs(kind, sizes, bias, batched, initial, seed):
    "A step: names, initial weights, text, states and all gradients are torch.nn's, whatever the arguments."
    batch, features, hidden = sizes
    modules = []
    for module in CELLS[kind]:
        torch.manual_seed(seed)
        modules.append(module(features, hidden, bias=bias, dtype=torch.float64))
    ours, theirs = modules
    assert str(ours) == str(theirs)
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    size = (batch,) if batched else ()
    x = tensors(*size, features).requires_grad_()
    states = [tensors(*size, hidden, seed=i).requires_grad_() for i in range(len(ours.cell.states))]
    hx = None if not initial else tuple(states) if kind == "LSTM" else states[0]
    results = []
    for module in modules:
        found = module(x, hx)
        found = found if kind == "LSTM" else (found,)
        given = [x, *(states if initial else []), *module.parameters()]
        results.append([found, torch.autograd.grad(sum(f.sin().sum() for f in found), given, allow_unused=True, materialize_grads=True)])
    assert_close(*results, rtol=1e-10, atol=1e-12)

STEPS = {"one axis too many": (torch.zeros(4, 2, 3), None), "features": (torch.zeros(4, 4), None), "another batch": (torch.zeros(4, 3), torch.zeros(3, 2)),
         "units": (torch.zeros(4, 3), torch.zeros(4, 3)), "double": (torch.zeros(4, 3).double(), None)}

@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("case", STEPS)
def test_steps_are_refused_as_by_torch(kind, case):
    x, hx = STEPS[case]
    if kind == "LSTM" and hx is not None: hx = hx, hx
    ours, theirs = (raised(lambda: module(3, 2)(x, hx)) for module in CELLS[kind])
    assert ours is theirs and ours is not None

MODELS = {"GRU": {"update_gate": "squared_sigmoid"}, "LSTM": {"forget_gate": "kaf"}, "MGU": {"gate": "kaf"}}

@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 99), levels=st.integers(1, 2), both=st.booleans(), mask=st.booleans(),
       data=st.data())
def test_engines_agree_in_every_form(kind, seed, levels, both, mask, data):
    "The compiled engine and the eager one: levels, directions, packed input, recurrent dropout, values and gradients."
    results, options = [], {"num_layers": levels, "bidirectional": both, "recurrent_dropout": mask * .5, "dtype": torch.float64}
    leaf, x, _ = batch(data.draw, 3, False)
    for backend in ("eager", "numba"):
        torch.manual_seed(seed)
        module = getattr(gatednb, kind)(3, 4, backend=backend, **options, **MODELS[kind])
        outputs, final = module(x)
        values = outputs.data if isinstance(outputs, PackedSequence) else outputs
        found = torch.autograd.grad(values.sin().sum(), [leaf, *module.parameters()], retain_graph=True)
        results.append([outputs, final, found])
    assert_close(*results, rtol=1e-10, atol=1e-12)


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


class Doubled(nn.Module):
    def forward(self, weight): return 2 * weight

COMPUTED = {"parametrize": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
            "prune": lambda module, name: prune.random_unstructured(module, name, amount=.5),
            "weight_norm": lambda module, name: weight_norm(module, name, dim=0)}
MODULES = {"GRU": (GRU, (3, 4), {}), "LSTM projected": (LSTM, (3, 4), {"proj_size": 2}), "KAFGRU": (KAFGRU, (3, 4), {}),
           "refined": (RefinedGRU, (3, 4), {"x_projection": True}), "two directions": (MGU, (3, 4), {"bidirectional": True}),
           "GRUCell": (GRUCell, (3, 4), {}), "LSTMCell": (LSTMCell, (3, 4), {})}

@pytest.mark.parametrize("kind,sizes,options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("utility", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("backend", ["numba", "eager"])
def test_weights_that_are_computed(kind, sizes, options, utility, backend):
    "Parametrized and pruned weights are what the layer runs with, one by one and all together."
    make = lambda: kind(*sizes, dtype=torch.float64, backend=backend, **options)
    torch.manual_seed(0)
    start = make().state_dict()
    given = tensors(2, 3) if "Cell" in kind.__name__ else tensors(5, 2, 3)
    for names in (*([name] for name in start), list(start)):
        layer, plain = make(), make()
        layer.load_state_dict(start)
        for name in names: utility(layer, name)
        plain.load_state_dict({name: getattr(layer, name).detach() for name in start})
        assert_close(layer(given), plain(given), rtol=1e-12, atol=1e-12)
        first = layer(given)
        first = first if isinstance(first, torch.Tensor) else first[0]
        originals = [p for n, p in layer.named_parameters() if "original" in n or n.endswith("_orig")]
        assert len(originals) >= len(names)
        assert all(g is not None for g in torch.autograd.grad(first.square().sum(), originals, allow_unused=True))

def test_weights_of_a_gate_layer_that_are_computed():
    from gatednb.zoo.outside import GateLayer
    layer = GateLayer("kaf", 5).double()
    before = layer(tensors(3, 5))
    parametrize.register_parametrization(layer, "alpha", Doubled())
    assert (layer(tensors(3, 5)) - before).abs().max() > .01

@pytest.mark.parametrize("kind", [GRU, LSTM, KAFGRU, MGU])
@pytest.mark.parametrize("gradients", [False, True])
def test_traced_by_torchscript(kind, gradients):
    "A trace follows its input; it is not the output of the example."
    layer, example, other = kind(3, 4), *(tensors(5, 2, 3, seed=k).float() for k in (0, 1))
    with torch.set_grad_enabled(gradients), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(layer, example)
        assert_close(traced(other), layer(other))

def test_a_mask_on_a_projected_state_is_refused():
    with pytest.raises(ValueError, match="recurrent_dropout is 0.5 and proj_size 2"): LSTM(3, 4, proj_size=2, recurrent_dropout=.5)

@pytest.mark.parametrize("kind,arguments,options,error,words", [
    (GRU, (3, None), {}, TypeError, "hidden_size is None"), (GRU, (3, 4), {"dropout": "0.5"}, ValueError, "dropout is '0.5'"),
    (LSTM, (3, 4), {"num_layers": True}, TypeError, "num_layers is True")])
def test_arguments_of_wrong_types(kind, arguments, options, error, words):
    with pytest.raises(error, match=words): kind(*arguments, **options)

def test_a_pair_of_states_is_no_state_of_a_gru():
    h = torch.zeros(1, 2, 4)
    for kind in (GRU, nn.GRU):
        with pytest.raises(AttributeError): kind(3, 4)(torch.zeros(5, 2, 3), (h, h))

def test_text_says_the_cell_and_its_own_gates():
    import pickle
    from gatednb import RecurrentLayer
    from gatednb.zoo.cells import janet
    from gatednb.zoo.light import min_gru
    assert str(pickle.loads(pickle.dumps(GRU(3, 4)))) == str(nn.GRU(3, 4))
    assert str(RecurrentLayer(min_gru().fill(), 3, 4)) == "RecurrentLayer(minGRU, 3, 4)"
    assert str(RecurrentLayer(janet().fill(), 3, 4)) == "RecurrentLayer(JANET, 3, 4)"
    assert str(GRU(3, 4, update_gate="kaf")) == "GRU(3, 4, update_gate='kaf')"
