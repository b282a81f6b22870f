"""The page in a headless browser: what a visitor sees at three widths, by mouse and by keyboard."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_client import RunningPage

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "tests/golden/text_and_image_processing/image0.png"
WIDTHS = {1280: 800, 768: 1024, 390: 844}
# A folder for screenshots, and the file of axe-core's axe.min.js, which is not part of this project.
SHOTS, AXE = os.environ.get("LIBRA_SCREENSHOTS"), os.environ.get("LIBRA_AXE")


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with RunningPage(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = find_browser()
    if path is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


class Seen:
    """What a tab asked for and complained of."""

    def __init__(self, tab):
        self.asked, self.said, self.statuses = [], [], set()
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("response", lambda response: self.statuses.add(response.status))
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))


@contextmanager
def opened(browser, page, width: int = 1280, **settings):
    """A tab in which the first example is answered, and what it has :class:`Seen`."""
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, **settings)
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    seen = Seen(tab)
    tab.goto(page.url)
    tab.locator(".card dd").nth(10).wait_for()
    yield tab, seen
    assert not seen.said, seen.said
    context.close()


def answers(tab) -> list[str]:
    return tab.evaluate("cards.map(card => card.text)")


def answered(tab) -> list[str]:
    """The answers when the running question is through."""
    tab.locator("#ask:not([disabled])").wait_for()
    return answers(tab)


def shot(tab, name: str) -> None:
    if SHOTS:
        tab.screenshot(path=str(Path(SHOTS, f"{name}.png")), full_page=True)


@pytest.mark.parametrize(
    "width", [pytest.param(width, marks=[pytest.mark.slow] * (width == 768)) for width in WIDTHS]
)
def test_it_fits_and_shows_an_answer_at_once(browser, page, width):
    with opened(browser, page, width) as (tab, _):
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        plain, libra, fastv = answers(tab)
        assert plain == libra != fastv
        assert "The right answer: " + plain in tab.locator("#known").inner_text()
        assert tab.locator(".card del").count() >= 1  # what FastV does not see
        assert tab.locator(".card").nth(1).locator("mark, del").count() == 0
        nodes = "marked('a red 3', 'a blue 3 4').map(node => (node.outerHTML || node)).join('')"
        assert tab.evaluate(nodes) == "a <mark>red</mark> <del>blue</del> 3 <del>4</del> "
        for text in tab.locator("button, label, h2, .key, dd").all():  # nothing is cut
            if text.is_visible():
                assert text.evaluate(
                    "node => node.scrollWidth <= node.clientWidth + 1 || getComputedStyle(node)"
                    ".display.startsWith('inline')"
                ), text.inner_text()
        shot(tab, f"page-{width}")


def test_three_questions_of_a_stranger_need_no_scrolling(browser, page):
    """What does it do, what do the colours mean, is it faster and how is that known."""
    with opened(browser, page) as (tab, _):
        seen = [
            tab.get_by_text(
                "answers your question with all of them and with two methods that keep only a part"
            ),
            *tab.locator("#meaning .key:visible").all(),
            tab.get_by_text("Is it faster?"),
            tab.get_by_text("measured here and now, on request"),
            tab.get_by_role("button", name="Measure the time"),
            *tab.locator(".card .answer").all(),
        ]
        assert len(seen) == 1 + 5 + 3 + 3
        for place in seen:
            box = place.bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= WIDTHS[1280]


def test_a_picture_of_ones_own_and_a_conversation(browser, page):
    with opened(browser, page) as (tab, seen):
        tab.set_input_files("#file", str(PICTURE))
        tab.locator("#picture[src^=data]").wait_for()
        tab.get_by_label("Question").fill("how many digits are there ?")
        tab.get_by_role("button", name="Ask", exact=True).click()
        tab.locator(".turn:nth-child(2)").first.wait_for()
        first = answered(tab)
        assert all(re.fullmatch(r"\d+", answer) for answer in first)
        assert not tab.locator("#known").is_visible()  # nobody knows it
        tab.get_by_label("Question").fill("read all the digits in order .")
        tab.keyboard.press("Enter")
        tab.locator(".turn:nth-child(3)").first.wait_for()
        answered(tab)
        assert tab.locator(".card").first.locator(".turn").count() == 3  # all of them stand
        asked = tab.evaluate("state.turns.map(turn => turn.question)")
        assert asked == ["how many digits are there ?", "read all the digits in order ."]
        tab.get_by_role("button", name="New conversation").click()
        assert (
            tab.evaluate("state.turns.length") == 0
            and tab.locator(".card").first.locator(".turn").count() == 3
        )
        assert all(url.startswith((f"{page.url}/", "data:", "blob:")) for url in seen.asked)
        assert seen.statuses <= {200, 206, 304}


def test_a_mistake_stands_at_its_field_and_answers_stay(browser, page):
    with opened(browser, page) as (tab, _):
        before = answers(tab)

        def refused(field: str, sentence: str) -> None:
            tab.get_by_role("button", name="Ask", exact=True).click()
            tab.locator(f"#mistake-{field}", has_text=sentence).wait_for()
            assert tab.locator(".mistake:visible").count() == 1 and answered(tab) == before
            where = "file" if field == "picture" else field
            assert tab.locator(f"#{where}").get_attribute("aria-invalid") == "true"

        tab.get_by_label("Question").fill(" ")
        refused("question", "write a question")
        tab.get_by_label("Question").fill("describe the digits .")
        tab.locator("#layers1").fill("99")
        refused("way1", "99")
        tab.locator("#layers1").fill("")
        tab.locator("#share").fill("5")
        refused("way0", "out of range")
        shot(tab, "page-mistake")
        tab.locator("#share").fill("60")
        tab.get_by_role("button", name="Ask", exact=True).click()
        tab.locator(".turn:nth-child(2)").first.wait_for()
        assert not tab.locator(".mistake:visible").count()
        answered(tab)


def test_tokens_by_mouse_and_by_keyboard(browser, page):
    with opened(browser, page) as (tab, _):
        card = tab.locator(".card").nth(1)
        drawing, told = card.locator("canvas"), card.locator(".token")
        box = drawing.bounding_box()
        assert box["width"] >= 300  # large enough to see a token
        drawing.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
        assert re.search(r"Token \d+: .*Interval \d+, of \d+ tokens?", told.inner_text())
        pixels = "canvas => canvas.toDataURL()"
        chosen = drawing.evaluate(pixels)
        drawing.focus()
        tab.keyboard.press("Home")
        assert told.inner_text().startswith("Token 0:") and drawing.evaluate(pixels) != chosen
        tab.keyboard.press("ArrowDown")
        assert told.inner_text().startswith("Token 16:")
        tab.keyboard.press("ArrowRight")
        assert (
            drawing.get_attribute("aria-valuetext") == told.inner_text() and "Token 17:" in told.inner_text()
        )
        slider = card.get_by_label("Place")
        assert "after layer 2" in card.locator("output").inner_text()
        slider.focus()
        tab.keyboard.press("End")
        assert "after layer 8" in card.locator("output").inner_text()
        fates = drawing.evaluate(pixels)
        tab.get_by_label("how important the model found it").check()
        assert drawing.evaluate(pixels) != fates
        assert tab.get_by_text("importance: low to high").is_visible()
        assert not tab.get_by_text("in the compensation token", exact=True).first.is_visible()
        shot(tab, "page-importance")


@pytest.mark.slow
def test_time_is_a_median_with_its_spread_and_only_on_request(browser, page):
    with opened(browser, page) as (tab, seen):
        assert not tab.locator("#times table").count() and not [
            url for url in seen.asked if url.endswith("/time")
        ]
        tab.get_by_role("button", name="Measure the time").click()
        tab.locator("#times table").wait_for(timeout=120_000)
        rows = [row.locator("td").all_inner_texts() for row in tab.locator("#times tbody tr").all()]
        assert len(rows) == 3 and all(re.search(r"m?s \(.+ to .+\)", row[0]) for row in rows)
        assert rows[0][1] == "1" and all(re.fullmatch(r"\d\.\d\d \(.+ to .+\)", row[1]) for row in rows[1:])
        assert "took turns" in tab.locator("#times-note").inner_text()
        shot(tab, "page-times")


def test_an_answer_can_be_stopped(browser, page):
    with opened(browser, page) as (tab, _):
        tab.get_by_role("button", name="Measure the time").click()
        tab.get_by_role("button", name="Stop").click()
        tab.get_by_text("stopped before it was measured").wait_for()
        assert not tab.locator("#times table").count()


def test_it_is_dark_where_that_is_wanted(browser, page):
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, page, color_scheme="dark") as (tab, _):
        assert max(map(int, re.findall(r"\d+", tab.evaluate(ground)))) < 60
        shot(tab, "page-dark")


@pytest.mark.skipif(not AXE, reason="slow: give the file of axe.min.js in LIBRA_AXE")
@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_serious(browser, page, width, scheme):
    with opened(browser, page, width, color_scheme=scheme, bypass_csp=True) as (tab, _):
        tab.evaluate(Path(AXE).read_text())
        found = tab.evaluate("axe.run()")["violations"]
        serious = [
            (one["id"], one["help"], [node["html"][:200] for node in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not serious
        assert not found, [one["id"] for one in found]


def listening_at(port: int) -> set[str]:
    """The IPv4 and IPv6 addresses (hexadecimal, as the kernel writes them) at which somebody listens to a
    port."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def test_it_listens_to_this_machine_only(page):
    if not Path("/proc/net/tcp").exists():
        pytest.skip("slow: addresses are read from /proc")
    assert listening_at(page.port) == {"0100007F"}
