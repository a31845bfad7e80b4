"""The pages of the Prefect UI, in a real browser: the form submits, and the run's page shows what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from tests.end_to_end.stack import Stack, wait_for

CHROMIUM = shutil.which("chromium")
# Without these a browser on a closed network keeps asking for its maker's servers.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
]

pytestmark = [
    pytest.mark.xdist_group("stack two"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="missing server: chromium is not installed"),
]


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.set_default_timeout(180_000)
        yield page
        browser.close()


def test_the_form_submits_and_the_page_shows_the_contact_sheet(stack: Stack, page: Page) -> None:
    ui = str(stack.info()["prefect_ui_url"])
    deployment = stack.api("GET", "/deployments/name/generate/default")["id"]
    before = {run["id"] for run in stack.api("POST", "/flow_runs/filter", {})}

    page.goto(f"{ui}/deployments/deployment/{deployment}/run")
    field(page, "Name (Optional)").fill("from a browser")
    field(page, "Seed (Optional)").wait_for()
    page.wait_for_timeout(2000)  # fields are drawn late, and lose what was filled in before
    assert page.locator(".schema-form-property__label").count() <= 13, "the request, and at most twelve fields"
    field(page, "Prompts (Optional)").fill('a red ball moves left\n{"prompt": "a blue ball moves right"}')
    field(page, "Seed (Optional)").fill(str(stack.seed()))
    field(page, "Frames (Optional)").fill("50")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("50 is not one of [49, 53, 57, 61, 65]").first.wait_for()
    field(page, "Frames (Optional)").fill("9")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(lambda url: not url.endswith("/run"), timeout=120_000)

    def submitted() -> str | None:
        wanted = {"flows": {"name": {"any_": ["generate"]}}, "sort": "EXPECTED_START_TIME_DESC"}
        runs = stack.api("POST", "/flow_runs/filter", wanted)
        return next((run["id"] for run in runs if run["id"] not in before), None)

    run_id = wait_for(submitted, "the form's flow run")
    stack.ended(run_id)
    assert stack.statuses(stack.request_of(run_id)) == ["done"] * 2

    page.goto(f"{ui}/runs/flow-run/{run_id}")
    page.get_by_text("Artifacts", exact=True).first.click()
    for kind in ("0-status", "clips", "shards", "summary", "outputs", "contact-sheet"):
        page.get_by_text(kind).first.wait_for()
    page.goto(f"{ui}/artifacts/artifact/{stack.artifacts(run_id)['clips']['id']}")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=stack.clips(stack.request_of(run_id))[0]["clip_id"]).click()
    film = opened.value.locator("video")
    wait_for(lambda: film.evaluate("video => video.readyState >= 2 && video.videoWidth > 0"), "the clip to play")
    opened.value.close()
    page.goto(f"{ui}/artifacts/artifact/{stack.artifacts(run_id)['contact-sheet']['id']}")
    picture = page.locator("img[src^='data:image/']").first
    picture.wait_for()
    wait_for(lambda: picture.evaluate("image => image.complete && image.naturalWidth > 300"), "the picture to load")


def field(page: Page, label: str) -> Locator:
    """The input below a label of the form."""
    named = f".p-label:has(> .p-label__header .schema-form-property__label:text-is('{label}'))"
    return page.locator(named).locator("textarea, input:visible").first
