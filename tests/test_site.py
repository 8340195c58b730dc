"""The built site in a browser: every page loads alone, is legible and accessible in both modes, and fits a telephone."""
import pytest, yaml
from conftest import ROOT

def pages(part):
    "The pages that the table of contents names."
    if isinstance(part, list): return [page for entry in part for page in pages(entry)]
    if not isinstance(part, dict): return []
    return [part[key] for key in ("root", "file") if key in part] + [page for value in part.values() for page in pages(value)]

PAGES = pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
DEVICE = {"width": 1280, "height": 900}

def open_page(browser, url, lands="**", **options):
    "A page in a fresh context, and what went wrong on it so far: errors, and requests that leave this machine."
    page = browser.new_context(viewport=DEVICE, reduced_motion="reduce", **options).new_page()
    wrong = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(f"asks {request.url}")
            if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")) else None)
    page.goto(url)
    page.wait_for_url(lands, wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise.then(() => true) ?? true")
    return page, wrong

def set_mode(page, mode):
    "Show the page in light or dark mode, with transitions done."
    page.evaluate("mode => Object.assign(document.documentElement.dataset, {mode: mode, theme: mode})", mode)
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")

@pytest.fixture(scope="module", params=PAGES)
def opened(request, browser, address):
    page, wrong = open_page(browser, f"{address}/{request.param}.html")
    yield page, wrong
    page.context.close()

def test_loads_alone(opened):
    page, wrong = opened
    assert wrong == []
    assert page.locator("h1").first.inner_text().strip()

def test_formulas_are_rendered(opened):
    page, _ = opened
    sources, rendered = page.locator(".bd-article .math").count(), page.locator(".bd-article .math mjx-container").count()
    assert rendered >= sources
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    raw = page.evaluate("""() => {
        const walker = document.createTreeWalker(document.querySelector(".bd-article"), NodeFilter.SHOW_TEXT), found = [];
        while (walker.nextNode()) {
            const node = walker.currentNode;
            if (node.data.includes("$") && !node.parentElement.closest("pre, code, script, style, svg, mjx-container")) found.push(node.data.trim());
        }
        return found;
    }""")
    assert raw == []                                                            # a dollar in prose is a formula that was not read

@pytest.mark.parametrize("mode", ["light", "dark"])
def test_accessible(opened, mode):
    from axe_playwright_python.sync_playwright import Axe
    page, _ = opened
    set_mode(page, mode)
    options = {"resultTypes": ["violations"]}
    if mode == "dark": options["runOnly"] = ["color-contrast"]                  # all else is the same in both modes
    found = Axe().run(page, options=options).response["violations"]
    grave = [f"{violation['id']}: {node['html'][:200]} {node.get('failureSummary', '')}" for violation in found
             if violation["impact"] in ("serious", "critical") for node in violation["nodes"][:3]]
    assert not grave, "\n".join(grave)

def test_solutions_pass_their_checks(opened):
    page, _ = opened
    wrong = page.locator(".solution .output").evaluate_all("all => all.map(node => node.textContent).filter(text => text.includes('Not yet'))")
    assert wrong == []

def test_figures_have_no_box_in_dark_mode(opened):
    page, _ = opened
    set_mode(page, "dark")
    boxes = page.evaluate("""() => [...document.querySelectorAll('.cell_output .text_html:has(svg), .cell_output img[src$=".svg"]')]
                             .map(box => getComputedStyle(box).backgroundColor)""")
    assert all(colour == "rgba(0, 0, 0, 0)" for colour in boxes)

def test_fits_a_telephone(opened):
    page, _ = opened
    page.set_viewport_size({"width": 390, "height": 844})
    width = page.evaluate("() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    wide = page.evaluate("""() => [...document.querySelectorAll('.bd-article *')].filter(node => {
        if (node.getBoundingClientRect().right <= 391) return false;
        for (let box = node.parentElement; box; box = box.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) return false;
        return true; }).slice(0, 3).map(node => node.outerHTML.slice(0, 150))""")
    page.set_viewport_size(DEVICE)
    assert width <= 390 and not wide, wide

def test_search_finds_a_chapter(browser, address):
    page, wrong = open_page(browser, f"{address}/search.html?q=squared+sigmoid")
    page.wait_for_selector("#search-results ul.search li a")
    hits = page.locator("#search-results ul.search li a").evaluate_all("links => links.map(link => link.pathname)")
    page.context.close()
    expected = [f"/{name}.html" for name in PAGES if name.endswith(("_sst", "_squared"))]
    assert hits and set(expected) <= set(hits) and wrong == []

def test_search_opens_from_any_page(browser, address):
    page, _ = open_page(browser, f"{address}/{PAGES[-1]}.html")
    page.locator("button.search-button__button:visible").first.click()
    page.locator("dialog[open] input[type=search]").fill("gate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results ul.search li a")
    page.context.close()

@pytest.mark.parametrize("system", ["light", "dark"])
def test_mode_follows_the_system_and_the_switch(browser, address, system):
    page, _ = open_page(browser, f"{address}/{PAGES[0]}.html", color_scheme=system)
    def theme(): return page.evaluate("() => document.documentElement.dataset.theme")
    def paper(): return page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    seen = {theme(): paper()}
    assert list(seen) == [system]
    for _ in range(2):
        page.locator("button.theme-switch-button:visible").first.click()
        seen[theme()] = paper()
    page.context.close()
    assert set(seen) == {"light", "dark"} and seen["light"] != seen["dark"]

def test_opens_without_a_server(browser, site):
    page, wrong = open_page(browser, (site / "index.html").as_uri(), lands=f"**/{PAGES[0]}.html")
    assert wrong == [] and page.locator("h1").first.inner_text().strip()
    page.context.close()
