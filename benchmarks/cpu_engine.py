"""Time and memory of the compiled CPU engine beside torch.nn's layers, forward and backward.

    python benchmarks/cpu_engine.py            # three processes, about ten minutes; writes cpu_engine.json
    python benchmarks/cpu_engine.py --quick    # one process, few repetitions; writes nothing

Each process times all layers in turn, in a new order each time, so that what slows the machine down
hits all of them alike, and takes the median of each. As in training, a layer runs some times in
succession; the first time is not counted. The figures are ratios within one process, and the median
of three processes; bars are the ratios that the project holds itself to.
"""
import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

SIZES = [(784, 32, 1, 100), (28, 32, 28, 100), (128, 64, 9, 128), (256, 16, 64, 256),
         (50, 8, 16, 32), (35, 20, 650, 650), (100, 64, 512, 512)]    # time, batch, input, hidden
GRU_BARS = dict(zip(SIZES, (.30, .40, .40, .30, .13, .72, .72)))
LSTM_BARS = dict(zip(SIZES, (1.0, 1.0, 1.25, 1.25, 1.0, 1.25, 1.25)))
THREADS = 2


def layers(features, hidden):
    "Name → (layer, name of the layer that it is compared with, bar at each size)."
    import torch
    from gatednb import GRU, KAFGRU, LSTM, MGU, RefinedGRU, RefinedLSTM, SSTGRU
    squared = dict(reset_gate="squared_sigmoid", update_gate="squared_sigmoid")
    kaf = dict(reset_gate="kaf", update_gate="kaf")
    refined = dict(x_projection=features != hidden)
    forms = {"squared": squared, "KAF": kaf}
    ours = {"GRU sigmoid": GRU(features, hidden),
            **{f"GRU {name}": GRU(features, hidden, **gates) for name, gates in forms.items()},
            "GRU refined": RefinedGRU(features, hidden, reset_after=True, **refined),
            "GRU reset before": GRU(features, hidden, reset_after=False),
            "SSTGRU": SSTGRU(features, hidden), "KAFGRU": KAFGRU(features, hidden),
            "RefinedGRU": RefinedGRU(features, hidden, **refined), "MGU": MGU(features, hidden),
            "LSTM sigmoid": LSTM(features, hidden),
            "LSTM squared": LSTM(features, hidden, input_gate="squared_sigmoid", forget_gate="squared_sigmoid",
                                 output_gate="squared_sigmoid"),
            "RefinedLSTM": RefinedLSTM(features, hidden, **refined)}
    theirs = {"nn.GRU": torch.nn.GRU(features, hidden), "nn.LSTM": torch.nn.LSTM(features, hidden)}
    return ours, theirs


def compared_with(name, size):
    "What a layer is compared with, and the bar: pairs of a name and a ratio."
    if name in ("GRU sigmoid", "GRU squared", "GRU refined"): return [("nn.GRU", GRU_BARS[size])]
    if name == "GRU KAF": return [("GRU sigmoid", 1.5), ("nn.GRU", None)]
    if name == "KAFGRU": return [("GRU reset before", 1.5), ("nn.GRU", None)]
    if "LSTM" in name: return [("nn.LSTM", LSTM_BARS[size])]
    two_phases = ("GRU reset before", 1.1 if size[3] >= 100 else None)
    if name == "GRU reset before": return [("GRU sigmoid", two_phases[1]), ("nn.GRU", None)]
    return [("GRU sigmoid", two_phases[1] if name in ("SSTGRU", "MGU") else None), ("nn.GRU", None)]


def step(layer, x, gradient):
    "One pass forward and backward, in seconds."
    for p in layer.parameters(): p.grad = None
    start = time.perf_counter()
    layer(x)[0].backward(gradient)
    return time.perf_counter() - start


def measure(size, budget):
    "Name → median seconds, of all layers at one size, after about `budget` seconds."
    import torch
    torch.manual_seed(0)
    T, B, features, hidden = size
    x, gradient = torch.randn(T, B, features), torch.randn(T, B, hidden)
    ours, theirs = layers(features, hidden)
    times = {name: [] for name in (*theirs, *ours)}
    everything = {**theirs, **ours}
    for layer in everything.values(): step(layer, x, gradient)       # compiles
    end, order = time.perf_counter() + budget, random.Random(0)
    while time.perf_counter() < end or len(times["nn.GRU"]) < 3:
        for name in order.sample(list(times), len(times)):
            step(everything[name], x, gradient)
            times[name] += [step(everything[name], x, gradient) for _ in range(3)]
    return {name: statistics.median(found) for name, found in times.items()}


def peak_memory(kind, size):
    "Bytes that the first pass forward and backward adds to what the process held before."
    import torch
    T, B, features, hidden = size
    if kind == "nn.GRU": make = torch.nn.GRU
    else:
        from gatednb import GRU
        make = partial(GRU, backend="numba", recompute=kind == "recompute")
    small = make(8, 16)      # loads or compiles the code and starts the threads, with little memory
    step(small, torch.randn(200, 64, 8), torch.randn(200, 64, 16))
    layer, x, gradient = make(features, hidden), torch.randn(T, B, features), torch.randn(T, B, hidden)
    ctypes.CDLL(None).malloc_trim(0)                   # gives free memory back
    Path("/proc/self/clear_refs").write_text("5")      # forgets earlier peaks
    before = held("VmRSS")
    step(layer, x, gradient)
    return held("VmHWM") - before


def held(key):
    "Bytes of memory that the system says this process holds, or once held."
    line = next(line for line in Path("/proc/self/status").open() if line.startswith(key))
    return 1024 * int(line.split()[1])


def child(*arguments):
    "What this script prints as JSON in a process of its own."
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def hardware():
    "What the figures depend on."
    import torch
    from gatednb.engines.vectors import llvm
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    return {"cpu": cpu or platform.processor(), "llvm_cpu": llvm.get_host_cpu_name(), "cores": os.cpu_count(),
            "threads": THREADS, "python": platform.python_version(), "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one process, few repetitions, no file")
    parser.add_argument("--times", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch
    torch.set_num_threads(THREADS)
    if options.times:
        size, budget = json.loads(options.times[0]), float(options.times[1])
        return print(json.dumps(measure(tuple(size), budget)))
    if options.memory: return print(peak_memory(options.memory[0], json.loads(options.memory[1])))
    processes, budget = (1, 5) if options.quick else (3, 20)
    result = {"hardware": hardware(), "times": [], "memory": []}
    for size in SIZES:
        found = [child("--times", json.dumps(size), budget) for _ in range(processes)]
        print("T, B, input, H =", *size)
        for name in found[0]:
            seconds = statistics.median(f[name] for f in found)
            row = {"size": size, "layer": name, "milliseconds": round(1e3 * seconds, 3), "ratios": {}}
            for other, bar in compared_with(name, size) if not name.startswith("nn.") else ():
                ratios = sorted(f[name] / f[other] for f in found)
                row["ratios"][other] = {"median": round(statistics.median(ratios), 3), "bar": bar,
                                        "each": [round(r, 3) for r in ratios]}
            verdicts = "".join(f"  {r['median']:.3f} of {other}" +
                               ("" if r["bar"] is None else f" ({'holds' if r['median'] <= r['bar'] else 'ABOVE'} {r['bar']})")
                               for other, r in row["ratios"].items())
            print(f"  {name:18}{row['milliseconds']:10.2f} ms{verdicts}", flush=True)
            result["times"].append(row)
    for size in SIZES:
        found = {kind: child("--memory", kind, json.dumps(size)) for kind in ("nn.GRU", "GRU", "recompute")}
        result["memory"].append({"size": size, "bytes": found})
        print("memory at", *size, {k: f"{v / 2**20:.1f} MiB" for k, v in found.items()}, flush=True)
    if not options.quick:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
