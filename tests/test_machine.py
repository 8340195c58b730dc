"""Machine code on disk, seen from outside: new processes, several at once, forks, and a disk that is of no use."""
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import gatednb
from gatednb.engines import machine
from gatednb.engines.vectors import Code, load, store

asked = []


def text(factor=3):
    "LLVM's text of a function that multiplies; it notes that it was asked for."
    asked.append(factor)
    code = Code("multiple", 2, "float64")
    source, target = code.arguments
    store(code, load(code, source) * factor, target)
    return code.text()


def apply(address):
    "The function at an address, of 7."
    numbers, results = (ctypes.c_double * 8)(*[7] * 8), (ctypes.c_double * 8)()
    machine.call_type(2)(address)(ctypes.addressof(numbers), ctypes.addressof(results))
    return results[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder for machine code, and no addresses remembered."
    monkeypatch.setenv("GATEDNB_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_addresses", {})
    # another process may be writing the package's files just now; one test asks for the real thing
    monkeypatch.setattr(machine, "_sources", lambda: machine._sources_at_import)
    asked.clear()
    return tmp_path / "machine"


def again(key="key"):
    "What a new process would get: the function of 7, and how often the text was asked for since the last time."
    machine._addresses.clear()
    asked.clear()
    return apply(machine.function_address("multiple", key, text)), len(asked)


def start(program, package=None):
    "A new process that runs a program with this file's helpers, and with a package of another folder if wanted."
    path = os.pathsep.join(str(folder) for folder in (package, Path(__file__).parent) if folder)
    program = "import os, sys, threading, time\nfrom test_machine import apply, asked, machine, text\n" + program
    return subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, cwd=package,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, said=""):
    "What a process printed; it must end well, and in time."
    try: printed, errors = process.communicate(said, timeout=120)
    finally: process.kill()
    assert process.returncode == 0, errors
    return printed.split()


def test_a_kept_function_is_not_compiled_again(folder):
    assert [again(), again(), again("other")] == [(21, 1), (21, 0), (21, 1)]
    assert len([*folder.iterdir()]) == 2


def test_the_folder_does_not_grow_for_ever(folder):
    "A write removes what is old once there is too much."
    again()
    with open(folder / "gatednb-old.o", "wb") as old: old.truncate(2 ** 27)        # takes no space on most disks
    os.utime(old.name, (0, 0))
    assert again() == (21, 0) and Path(old.name).exists()
    assert again("other") == (21, 1) and not Path(old.name).exists()
    assert again() == (21, 0)


def directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a bit of the seal": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "a bit of the code": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("Dear reader, this is no machine code at all.\n" * 20),
    "directory": directory,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_costs_a_compilation(folder, damage):
    again()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert again() == (21, 1)
    assert [*folder.iterdir()] == [path]                       # and leaves no other file behind
    if path.is_file():
        assert path.read_bytes() == whole and again() == (21, 0)


def test_a_file_of_another_key_is_not_taken(folder):
    again("first")
    (first,) = folder.iterdir()
    again("second")
    (second,) = {*folder.iterdir()} - {first}
    machine._addresses.clear()
    shutil.copy(first, second)
    assert again("second") == (21, 1)


def unusable(kind, folder, monkeypatch):
    "Make the folder of no use, in some way."
    if kind == "file": folder.write_text("I was here first.")
    if kind == "below a file":
        folder.write_text("I was here first.")
        monkeypatch.setenv("GATEDNB_CACHE", str(folder))
    if kind == "writable by all":
        folder.mkdir()
        folder.chmod(0o777)
    if kind == "of another user": monkeypatch.setattr(os, "getuid", lambda: folder.parent.stat().st_uid + 1)
    if kind == "not allowed": monkeypatch.setenv("GATEDNB_CACHE", "/proc")
    if kind == "no disk space": monkeypatch.setattr(os, "replace", raise_(OSError(28, "No space left on device")))
    if kind == "no home":
        monkeypatch.setenv("GATEDNB_CACHE", "~")
        monkeypatch.setattr(Path, "expanduser", raise_(RuntimeError("Could not determine home directory.")))
    if kind == "no description of Numba":
        machine._environment.cache_clear()
        monkeypatch.setattr(machine.importlib.metadata, "version", raise_(PackageNotFoundError("numba")))


def raise_(error):
    "A function that raises an error, whatever it is called with."
    def function(*_, **__): raise error
    return function


@pytest.mark.skipif(os.name != "posix", reason="folders of this system have no owner and mode")
@pytest.mark.parametrize("kind", ["file", "below a file", "writable by all", "of another user", "not allowed",
                                  "no disk space", "no home", "no description of Numba"])
def test_a_folder_that_cannot_be_used_costs_a_compilation(folder, kind, monkeypatch, caplog):
    unusable(kind, folder, monkeypatch)
    caplog.set_level("INFO", "gatednb")
    assert [again(), again()] == [(21, 1), (21, 1)]
    assert caplog.records                                      # the log says why
    assert not [*folder.rglob("*")]                            # nothing is left there


def test_three_threads_at_once_compile_once(folder):
    meet = threading.Barrier(3)
    def ask(_):
        meet.wait()
        return machine.function_address("multiple", "key", text)
    with ThreadPoolExecutor(3) as pool: addresses = [*pool.map(ask, range(3))]
    assert len(set(addresses)) == 1 and apply(addresses[0]) == 21 and len(asked) == 1


def test_two_processes_at_once_and_one_after_them(folder):
    program = '''
print("ready", flush=True)
sys.stdin.readline()
print(apply(machine.function_address("multiple", "key", text)), len(asked), "numba" in sys.modules)
'''
    both = [start(program), start(program)]
    for process in both: assert process.stdout.readline() == "ready\n"
    for process in both:                                       # both were waiting; now both go
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [finish(process)[0] for process in both] == ["21.0", "21.0"]
    assert len([*folder.iterdir()]) == 1
    assert finish(start(program), "go\n") == ["ready", "21.0", "0", "False"]     # Numba is slow to import


def test_a_process_that_is_killed_while_it_writes(folder):
    "What it leaves behind is not found under the name that others look for."
    killed = start('''
os.replace = lambda *_: os._exit(9)
machine.function_address("multiple", "key", text)
''')
    killed.communicate(timeout=120)
    assert killed.returncode == 9
    (part,) = folder.iterdir()
    assert [again(), again()] == [(21, 1), (21, 0)]
    machine.trim_cache(0)
    assert not part.exists()


def test_an_edited_source_file_compiles_again(folder, tmp_path):
    "Another text of a helper, in a file that the key does not name, is another function."
    copy = tmp_path / "copy"
    shutil.copytree(Path(gatednb.__file__).parent, copy / "gatednb", ignore=shutil.ignore_patterns("__pycache__"))
    helper = copy / "gatednb" / "engines" / "helper.py"
    program = '''
from gatednb.engines.helper import factor
print(machine.__file__, apply(machine.function_address("multiple", "key", lambda: text(factor))), len(asked))
'''
    printed = []
    for factor in (3, 3, 5):
        helper.write_text(f"factor = {factor}\n")
        origin, *rest = finish(start(program, copy))
        assert Path(origin).is_relative_to(copy)
        printed.append(rest)
    assert printed == [["21.0", "1"], ["21.0", "0"], ["35.0", "1"]]


def test_a_source_file_edited_while_a_process_runs(folder, tmp_path, monkeypatch):
    "What the process imported is no longer what lies there: neither read nor write."
    again()
    monkeypatch.setattr(machine, "_sources", lambda: [("symbols.py", "edited")])
    assert [again(), again("new"), again("new")] == [(21, 1)] * 3
    assert len([*folder.iterdir()]) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use_and_while_a_thread_compiles(folder):
    "A child calls what its parent compiled, and compiles something else; no lock is left held in it."
    program = '''
before = machine.function_address("multiple", "before", text)
compiling = threading.Event()

def slow():
    compiling.set()
    time.sleep(.5)
    return text()

thread = threading.Thread(target=machine.function_address, args=("multiple", "thread", slow))
thread.start()
compiling.wait()
child = os.fork()
if child == 0:
    compiled = len(asked)
    results = [apply(before), *(apply(machine.function_address("multiple", key, text)) for key in ("thread", "child"))]
    print(*results, len(asked) - compiled, flush=True)
    os._exit(0)
for _ in range(600):
    if os.waitpid(child, os.WNOHANG)[0]: break
    time.sleep(.1)
else: os.kill(child, 9); sys.exit("the child hangs")
thread.join()
print(apply(machine.function_address("multiple", "parent", text)))
'''
    # the child knows what the thread compiled, for the fork waited for it, and compiles one function of its own
    assert finish(start(program)) == ["21.0", "21.0", "21.0", "1", "21.0"]
    assert len([*folder.iterdir()]) == 4
