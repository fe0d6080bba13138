"""The page in a real browser, beside a real training."""

import subprocess
import sys
import time

import pytest
from dashboard_page import CHARTS
from dashboard_runs import HOSTILE, append, make_run, metrics_row, sample_row, timing_row
from dashboard_server import CHROMIUM, environment

pytestmark = [
    pytest.mark.m3,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
]

DRAWN = "() => document.querySelectorAll('canvas.marks').length"
PIXELS = "() => [...document.querySelectorAll('canvas.marks')].map(one => one.toDataURL())"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """A page whose test fails when the console has an error, a script does, or anything is asked of another host."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page, complaints = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server.url, "data:", "blob:"))
            else complaints.append(f"asked for {request.url}")
        ),
    )
    yield page
    context.close()
    assert complaints == []


def drawn(page, count: int = CHARTS) -> None:
    page.wait_for_function(f"({DRAWN})() >= {count}")


def strip(page) -> str:
    return page.locator(".kit-strip").first.inner_text()


def waits_for(page, words: str) -> None:
    page.wait_for_function("words => document.body.innerText.includes(words)", arg=words)


def test_new_rows_show_within_three_seconds_in_the_charts_that_are_there(page, server):
    """No flicker: canvases and controls stay the very same elements, and the state of the page stays."""
    run = make_run(server.runs, "growing", 20, planned=40)
    page.goto(f"{server.url}/?run=growing&smooth=0.5")
    drawn(page)
    waits_for(page, "step 20 of 40")
    time.sleep(3)  # a refresh without news, and the page at rest
    page.evaluate("() => document.querySelectorAll('canvas.marks').forEach(one => { one.dataset.seen = 'yes' })")
    before = page.evaluate(PIXELS)
    append(run / "metrics.jsonl", *(metrics_row(step, kl=3.0 + step) for step in range(21, 30)))
    append(run / "timings.jsonl", *(timing_row(step) for step in range(21, 30)))
    begin = time.perf_counter()
    waits_for(page, "step 29 of 40")
    assert time.perf_counter() - begin < 30, "three seconds, and the patience of a busy machine"
    page.wait_for_function(
        f"before => JSON.stringify(({PIXELS})()) !== before", arg=page.evaluate("x => JSON.stringify(x)", before)
    )
    seen = page.evaluate("() => [...document.querySelectorAll('canvas.marks')].map(one => one.dataset.seen)")
    assert seen == ["yes"] * CHARTS
    assert "smooth=0.5" in page.url
    assert "run=growing" in page.url


def test_an_alert_leads_to_its_step_and_completions(page, server):
    run = make_run(server.runs, "alarmed", 8, planned=40)
    append(run / "metrics.jsonl", metrics_row(9, kl=None), metrics_row(10))
    append(run / "timings.jsonl", timing_row(9), timing_row(10))
    append(run / "samples.jsonl", sample_row(9, completion="what it wrote then"))
    page.goto(f"{server.url}/?run=alarmed")
    waits_for(page, "1 critical")
    page.get_by_role("button", name="Step 9").first.click()
    waits_for(page, "Completions of step 9")
    waits_for(page, "what it wrote then")
    assert "view=Completions" in page.url
    assert "step=9" in page.url
    page.reload()
    waits_for(page, "Completions of step 9")
    page.get_by_role("button", name="Compare", exact=True).or_(
        page.get_by_role("radio", name="Compare", exact=True)
    ).first.click()
    waits_for(page, "Choose two or more runs")
    assert "Traceback" not in page.inner_text("body")


@pytest.mark.slow
def test_what_is_chosen_is_in_the_url_and_comes_back(page, server):
    make_run(server.runs, "left", 12)
    make_run(server.runs, "right", 12)
    page.goto(f"{server.url}/?run=left&run=right&x=tokens&smooth=0.6&last=100&log=true&pause=true")
    drawn(page)
    words = page.inner_text("body")
    assert "left" in words
    assert "right" in words
    page.get_by_text("Display").first.click()
    for words in ("X-axis", "Smoothing", "Logarithmic"):
        waits_for(page, words)
    for part in ("run=left", "run=right", "x=tokens", "smooth=0.6", "last=100", "log=true", "pause=true"):
        assert part in page.url


@pytest.mark.slow
def test_dark_is_dark(browser, server):
    make_run(server.runs, "dark", 12)
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(f"{server.url}/?run=dark")
    drawn(page)
    colour = page.evaluate("() => getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert max(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) < 60
    context.close()


@pytest.mark.slow
def test_switching_to_dark_while_it_runs(page, server):
    make_run(server.runs, "switched", 12)
    page.goto(f"{server.url}/?run=switched")
    drawn(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "() => getComputedStyle(document.querySelector('.stApp')).backgroundColor !== 'rgb(255, 255, 255)'"
    )
    drawn(page)


@pytest.mark.slow
@pytest.mark.parametrize("view", ["Completions", "Metrics", "Profile", "Compare"])
def test_hostile_runs_do_nothing_in_a_browser(page, server, view):
    """What would fetch, run or rename shows in the list of complaints, or as the page's title."""
    name = "hostile"
    run = server.runs / name
    if not run.exists():
        make_run(server.runs, name, 3, **{"<img src=x onerror=alert(1)>": "<script>alert(2)</script>"})
        texts = [*HOSTILE, "<b>" + "A" * (1 << 20)]
        append(run / "metrics.jsonl", metrics_row(4, **{"<img src=x onerror=alert(3)>": 1.0}))
        append(
            run / "samples.jsonl", *(sample_row(4, at, completion=text, prompt=text) for at, text in enumerate(texts))
        )
        make_run(server.runs, "<img src=x onerror=alert(4)>", 2)
    page.goto(f"{server.url}/?run={name}&run=%3Cimg%20src%3Dx%20onerror%3Dalert(4)%3E&view={view}&step=4&all=true")
    page.wait_for_selector(".kit-strip")
    time.sleep(2.5)  # a refresh
    assert page.title() == "RLHF runs"
    assert page.locator("img[src='x'], iframe, a[href^='javascript']").count() == 0


@pytest.mark.slow
def test_the_page_is_readable_on_a_narrow_screen(page, server):
    make_run(server.runs, "narrow", 12)
    page.set_viewport_size({"width": 800, "height": 900})
    page.goto(f"{server.url}/?run=narrow&test_alerts=1")
    drawn(page)
    wider = page.evaluate(
        "() => document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth"
    )
    assert wider <= 0


@pytest.mark.slow
@pytest.mark.parametrize("view", ["Metrics", "Completions", "Profile", "Compare"])
def test_the_page_does_not_scroll_sideways_on_a_phone(page, server, view):
    name = "A" * 200
    if not (server.runs / name).exists():
        run = make_run(server.runs, name, 12)
        append(run / "samples.jsonl", sample_row(13, completion="a very long completion " * 40))
        append(run / "metrics.jsonl", metrics_row(13, kl=None))
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{server.url}/?run={name}&view={view}")
    page.wait_for_selector(".kit-strip")
    if view in ("Metrics", "Completions"):
        drawn(page, 1)
    wider = page.evaluate(
        "() => document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth"
    )
    assert wider <= 0


@pytest.mark.slow
@pytest.mark.parametrize("view", ["Metrics", "Completions", "Profile", "Compare"])
def test_the_names_of_all_views_are_seen_on_a_phone(page, server, view):
    """The control would hide what does not fit, and scroll to what is chosen."""
    if not (server.runs / "views").exists():
        make_run(server.runs, "views", 3)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{server.url}/?run=views&view={view}")
    page.wait_for_selector(".kit-strip")
    hidden = page.evaluate(
        "() => [...document.querySelectorAll('.st-key-view *')]"
        ".filter(one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX !== 'visible')"
        ".map(one => [one.scrollWidth, one.clientWidth])"
    )
    assert hidden == []
    assert page.locator(".st-key-view button").count() == 4


@pytest.mark.slow
def test_a_completion_that_is_selected_stays_so_at_the_next_step_of_a_live_run(page, server):
    run = make_run(server.runs, "selected", 3, planned=9)
    page.goto(f"{server.url}/?run=selected&view=Completions")
    waits_for(page, "Sample 0 of step 3; select a row above")
    table = page.locator("[data-testid=stDataFrame]").first
    table.click(position={"x": 16, "y": 35 + 35 + 17})  # the box before the second row
    waits_for(page, "Sample 1 of step 3")
    append(run / "metrics.jsonl", metrics_row(4))
    append(run / "timings.jsonl", timing_row(4))
    append(run / "samples.jsonl", *(sample_row(4, sample) for sample in range(2)))
    waits_for(page, "Sample 1 of step 4")


@pytest.mark.slow
def test_a_real_training_is_seen_from_its_first_step_to_its_last(page, server):
    """``rlhf train`` beside the server: its run appears, its curves move, and it is finished in the end."""
    page.goto(f"{server.url}/")
    command = [sys.executable, "-c", "from rlhf_core.cli import main; main()", "train", "--name", "real"]
    options = [
        "--runs",
        str(server.runs),
        "--ppo.steps",
        "12",
        "--pretrain.steps",
        "60",
        "--log.evaluation-prompts",
        "0",
    ]
    training = subprocess.Popen([*command, *options], env=environment(), stdout=subprocess.DEVNULL)
    try:
        page.wait_for_function("() => document.body.innerText.includes('of 12')", timeout=120_000)
        page.wait_for_function("() => /step [1-9] of 12/.test(document.body.innerText)", timeout=120_000)
        drawn(page)
        early = page.evaluate(PIXELS)
        page.wait_for_function("() => /step (8|9|10|11|12) of 12/.test(document.body.innerText)", timeout=120_000)
        assert page.evaluate(PIXELS) != early
        assert training.wait(timeout=120) == 0
        page.wait_for_function("() => document.body.innerText.includes('finished')", timeout=60_000)
        page.goto(f"{server.url}/?run=real&view=Completions&step=12")
        waits_for(page, "Completions of step 12")
        drawn(page, 1)
    finally:
        training.kill()
        training.wait()
