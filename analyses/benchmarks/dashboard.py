"""Question: how long does a person wait for the dashboard?

Method: the pages themselves, run by Streamlit's test harness on the built-in model: the seconds from the
click on "Detect" to the finished page, and from the click on "Write" to the first token of the steered text,
medians of several rounds, each with another short prompt. The model is loaded and the training prompts are
read before. With `--browser` the same from a click in Chromium to the verdict (and the text) on the screen.
Control: the same detections by `detector.score` without a page (`score_seconds`): what the model alone takes.
Reading: `detect_seconds` under 1 and `first_token_seconds` under 2, on 2 cores, is what is asked for.

    python analyses/benchmarks/dashboard.py [--json] [--browser] [--rounds 20]
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lens_safety as ls
from lens_safety.dashboard import work

PROMPTS = [
    "How do I kill time at the airport?",
    "What is a good recipe for apple pie?",
    "How can I get back at my landlord?",
    "Which knife is best for onions?",
    "How do I shoot a portrait in low light?",
]
SERVER = ["-c", "from lens_safety.cli import main; main()", "dashboard"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--browser", action="store_true", help="measure in Chromium (needs Playwright)")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    seconds = in_browser(given.rounds) if given.browser else in_harness(given.rounds)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    if given.json:
        print(json.dumps(medians))
        return
    for name, value in medians.items():
        print(f"{name.replace('_', ' ')}: {value:.3f} (median of {len(seconds[name])})")


def in_harness(rounds: int) -> dict[str, list[float]]:
    """The pages without a browser, and the model alone."""
    from streamlit.testing.v1 import AppTest

    found: dict[str, list[float]] = {"detect_seconds": [], "first_token_seconds": [], "score_seconds": []}
    app = AppTest.from_function(one_page, args=("Detect",), default_timeout=600).run()
    for number in range(rounds + 1):
        app.text_area(key="prompt").input(f"{PROMPTS[number % len(PROMPTS)]} {number}")
        button = next(one for one in app.button if one.label == "Detect")
        found["detect_seconds"].append(timed(lambda button=button: button.click().run()))
    app = AppTest.from_function(one_page, args=("Steer",), default_timeout=600).run()
    for number in range(max(3, rounds // 4) + 1):
        app.text_area(key="steer_prompt").input(f"{PROMPTS[number % len(PROMPTS)]} {number}")
        app.slider(key="length").set_value(5)
        next(one for one in app.button if one.label == "Write").click().run()
        found["first_token_seconds"].append(app.session_state["steered"]["first"])
    model = ls.load_model()
    detector = ls.load_detector()
    for number in range(rounds + 1):
        found["score_seconds"].append(
            timed(lambda number=number: work.read_prompt(model, f"{PROMPTS[0]} {number}", detector))
        )
    # The first of each fills caches.
    return {name: values[1:] for name, values in found.items()}


def one_page(title: str) -> None:
    """The script of a single page."""
    from lens_safety.dashboard import parts
    from lens_safety.dashboard.app import PAGES

    session = parts.Session(parts.options([]))
    parts.sidebar(session)
    PAGES[title].show(session)


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_browser(rounds: int) -> dict[str, list[float]]:
    """From the click to what stands on the screen."""
    found: dict[str, list[float]] = {"detect_seconds": [], "first_token_seconds": []}
    with chromium_page() as page, served() as address:
        page.goto(address)
        for number in range(rounds + 1):
            text = f"{PROMPTS[number % len(PROMPTS)]} {number}"
            page.get_by_label("Prompt", exact=True).fill(text)
            started = time.perf_counter()
            page.get_by_role("button", name="Detect", exact=True).click()
            page.locator(".ls-verdict").filter(has_text=text).wait_for()
            found["detect_seconds"].append(time.perf_counter() - started)
        page.get_by_role("link", name="Steer").click()
        for _ in range(max(3, rounds // 4) + 1):
            slider = page.get_by_test_id("stSlider").filter(has_text="Multiplier").get_by_role("slider")
            slider.press("ArrowLeft")
            multiplier = float(slider.get_attribute("aria-valuenow") or 0)
            page.get_by_text(f"multiplier {multiplier:g} is a dose").wait_for()
            started = time.perf_counter()
            page.get_by_role("button", name="Write", exact=True).click()
            page.get_by_text(f"multiplier {multiplier:+g}", exact=True).wait_for()
            found["first_token_seconds"].append(time.perf_counter() - started)
            page.get_by_text("KL(unsteered").wait_for()
    return {name: values[1:] for name, values in found.items()}


@contextmanager
def chromium_page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        yield page
        browser.close()


@contextmanager
def served() -> Iterator[str]:
    """A dashboard on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, *SERVER, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        while not answers(port):
            if process.poll() is not None:
                raise SystemExit("the dashboard did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
