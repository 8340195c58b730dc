"""The page to play with gates, in a browser: it shows the library's numbers, by keyboard alone and without a network."""
import pytest, torch
from test_site import open_page

import gatednb

GATES = {gate.name.replace("_", " "): gate for gate in gatednb.catalogue.values() if gate.range != (-1, 1)}

@pytest.fixture(scope="module")
def page(browser, address):
    page, wrong = open_page(browser, f"{address}/nbs/14_explorer.html")
    yield page.locator(".gate-explorer").first, wrong
    page.context.close()

def put(page, name, value):
    page.locator(f'[name="{name}"]').evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }", str(value))

def read(page, name):
    return float(page.locator(f'[data-shown="{name}"]').inner_text().removesuffix("%").replace("–", "nan").replace("∞", "inf"))

def own_values(page):
    "What the sliders of the chosen gate say."
    return {k["name"]: torch.tensor([k["value"]], dtype=torch.float64) for k in page.locator(".own input").evaluate_all(
        "inputs => inputs.map(i => ({name: i.name, value: Number(i.value)}))")}

def arguments(gate, own):
    "The sliders' numbers as the gate's arguments, a parameter's numbers stacked."
    found = {name: value for name, value in own.items() if name in {a.name for a in gate.inputs}}
    for name, (shape, _) in gate.params.items():
        found[name] = torch.stack([own[f"{name}_{k}"] for k in range(shape[0])]) if shape else own[name]
    return found

@pytest.mark.parametrize("name", GATES)
def test_shows_the_librarys_numbers(page, name):
    page, wrong = page
    gate, slope, shift = GATES[name], 2.5, -.75
    page.locator("select").select_option(label=name)
    own = own_values(page)
    for k, key in enumerate(own): put(page, key, own[key].item() + .1 * (k + 1))
    given = arguments(gate, own_values(page))
    assert {k for k in given} == {a.name for a in gate.inputs[1:]} | set(gate.params)
    put(page, "slope", slope), put(page, "shift", shift)
    for s in (-3., -.5, .25, 2.):
        put(page, "s", s)
        at = torch.tensor([slope * (s - shift)], dtype=torch.float64)
        value, derivative = gate(at, **given).item(), slope * gate.evaluate(gate.derivative(), at, **given).item()
        assert read(page, "value") == pytest.approx(value, rel=1e-3) and read(page, "slope") == pytest.approx(derivative, rel=1e-3)
        if 0 < value < 1: assert read(page, "keeps") == pytest.approx(1 / (1 - value), rel=1e-3)
        if 0 < value < 1: assert read(page, "writes") == pytest.approx(1 / value, rel=1e-3)
    normal = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + .5) / 20_000)
    values = gate(slope * (normal - shift), **given)
    assert read(page, "mean") == pytest.approx(values.mean().item(), abs=2e-3)
    assert read(page, "sd") == pytest.approx(values.std().item(), abs=2e-3)
    assert read(page, "shut") == pytest.approx(100 * (values < .1).double().mean().item(), abs=.2)
    assert read(page, "wide") == pytest.approx(100 * (values > .9).double().mean().item(), abs=.2)
    assert wrong == []

def test_works_by_keyboard(page):
    page, _ = page
    keys = page.page.keyboard
    page.locator("select").focus()
    page.locator("select").select_option(label="sigmoid")
    keys.press("ArrowDown")
    assert page.locator("select").input_value() == "1"
    keys.press("Tab")
    before = read(page, "value")
    assert page.page.evaluate("document.activeElement.name") == "s"
    keys.press("Home")
    assert read(page, "value") < before
    names = []
    for _ in range(3):
        keys.press("Tab")
        names.append(page.page.evaluate("document.activeElement.name || document.activeElement.type"))
    assert names == ["slope", "shift", "reset"]
    keys.press("Enter")
    page.page.wait_for_function("document.querySelector('.gate-explorer [data-shown=value]').textContent === '0.5'")
    assert page.locator("[name=s]").input_value() == "0"

def test_pictures_are_described(page):
    page, _ = page
    page.locator("select").select_option(label="kaf")
    described = page.locator("svg").evaluate_all("all => all.map(svg => svg.getAttribute('aria-label'))")
    assert len(described) == 4 and all(len(text) > 20 for text in described)
    assert page.locator("svg path.curve").count() == 3 and page.locator("svg rect.bar").count() == 40
