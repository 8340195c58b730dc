"""The README keeps what it promises."""
import re
from pathlib import Path

from gatednb.plots import front_picture

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_of_the_readme_runs():
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks: exec(block, scope)
    assert scope["gates"]["f"].shape == (32, 50, 100)


def test_picture_is_drawn_from_the_gates():
    "Made by `python -c 'from gatednb.plots import front_picture; …'`; a changed gate makes it stale."
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert (ROOT / path).read_text(encoding="utf-8") == front_picture(), "draw it again: make picture"


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT): assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"`?make ([a-z]+)", TEXT): assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
