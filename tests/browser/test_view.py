"""The explorer's page alone, on synthetic numbers: pointer, keys, answers that come late, errors, export, themes."""

import io

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
RED, BLUE = (0x67, 0x00, 0x1F), (0x05, 0x30, 0x61)  # cosine +1 and -1


@pytest.fixture
def opened(new_page, served):
    """(query, page's settings) -> the page, once it is drawn."""

    def fake(query="", **how):
        page = new_page(**how)
        page.goto(f"{served}/tests/browser/fake.html?{query}")
        page.wait_for_selector("body[data-ready]")
        return page

    return fake


def press(page, x, y, panel=0):
    """Clicks a place (shares of width and height) of a panel's picture."""
    page.locator(".kvx-stack").nth(panel).scroll_into_view_if_needed()
    box = page.locator(".kvx-stack").nth(panel).bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def drag(page, start, end):
    page.locator(".kvx-stack").first.scroll_into_view_if_needed()
    box = page.locator(".kvx-stack").first.bounding_box()
    at = lambda point: (box["x"] + point[0] * box["width"], box["y"] + point[1] * box["height"])  # noqa: E731
    page.mouse.move(*at(start))
    page.mouse.down()
    page.mouse.move(*at(end), steps=4)
    page.mouse.up()


def pixel(page, x, y, layer="map", panel=0):
    """[r, g, b, a] of a panel's canvas at shares of its size."""
    return page.locator(f".kvx-{layer}").nth(panel).evaluate(
        "(c, [x, y]) => [...c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data]", [x, y])  # fmt: skip


def drawn(page, panel=0):
    return int(page.locator(".kvx-panel").nth(panel).get_attribute("data-drawn"))


def settled(page, count, panel=0):
    page.wait_for_function(f"document.querySelectorAll('.kvx-panel')[{panel}].dataset.drawn >= {count}")


def calls(page, op):
    return [call["params"] for call in page.evaluate("fake.calls") if call["op"] == op]


def info(page, panel=0):
    return page.locator(".kvx-info").nth(panel).inner_text()


def status(page):
    return page.get_by_role("status").inner_text()


def choose(page, label, value, panel=0):
    page.locator(".kvx-controls").nth(panel).get_by_label(label, exact=True).select_option(value)


def test_click_draws_similarity_to_the_token(opened, shots):
    page = opened("tiles=1")
    before = drawn(page)
    press(page, 0.02, 0.02)
    settled(page, before + 1)
    assert calls(page, "similar")[-1] == {"panel": 0, "token": 88, "source": "value", "layer": 3, "head": None, "from": 0}
    assert pixel(page, 0.01, 0.01)[:3] == list(RED) and np.abs(np.subtract(pixel(page, 0.99, 0.99)[:3], BLUE)).max() < 12
    assert info(page) == "token 88 · x 0 to 29.1, y 0 to 30 px · slot 93 · tiles · row 0, column 0 · value +1.00"
    choose(page, "tokens of", "0")
    press(page, 0.99, 0.99)
    page.wait_for_function("document.querySelector('.kvx-info').innerText.startsWith('token 87')")
    assert "base view · row 7, column 10" in info(page)
    page.screenshot(path=shots / "view_light.png", full_page=True)


def test_every_map_has_its_scale(opened):
    page = opened()
    count = drawn(page)
    choose(page, "map", "colours")
    settled(page, count + 1)
    assert pixel(page, 0.01, 0.01) == [0, 120, 128, 255] and page.locator(".kvx-bar").is_hidden()
    choose(page, "map", "words")
    assert "Type words" in page.locator(".kvx-note").inner_text()
    page.get_by_label("words").fill("fish")
    page.keyboard.press("Enter")
    settled(page, count + 3)
    assert page.locator(".kvx-ticks").inner_text().split() == ["−1.82", "0", "1.82"]  # symmetric, whatever the values
    assert pixel(page, 0.99, 0.5)[:3] == list(RED) and pixel(page, 0.01, 0.5)[:3] == list(BLUE)
    choose(page, "of", "pixels")  # no layers, no heads
    assert page.locator(".kvx-controls").get_by_label("layer").is_hidden()
    assert calls(page, "words")[-1] == {"panel": 0, "text": "fish", "source": "pixels", "layer": None}
    choose(page, "map", "attention")
    assert "Ask a question" in page.locator(".kvx-note").inner_text() and pixel(page, 0.5, 0.5)[3] == 0


def test_keys(opened, shots):
    page = opened()
    page.locator(".kvx-stack").focus()
    start = info(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "row 4, column 5" in start and "row 5, column 6" in info(page)
    for key in ("]", "h", "["):
        page.keyboard.press(key)
    page.wait_for_function("document.querySelector('.kvx').getAttribute('aria-busy') === 'false'")
    assert (calls(page, "similar")[-1]["layer"], calls(page, "similar")[-1]["head"]) == (3, 0)
    page.keyboard.press("g")
    assert page.get_by_label("token grid").is_checked() and pixel(page, 1 / 11, 0.05, "marks")[3] > 0
    opacity = page.get_by_label("opacity").input_value()
    page.keyboard.press("o")
    assert page.get_by_label("opacity").input_value() != opacity
    page.keyboard.press("m")
    assert page.get_by_label("map", exact=True).input_value() == "colours"
    page.keyboard.press("?")
    assert page.get_by_text("move the marked token").is_visible()
    page.screenshot(path=shots / "view_help.png", full_page=True)
    page.keyboard.press("Escape")
    assert page.get_by_text("move the marked token").is_hidden()
    page.get_by_label("question").fill("m g h [ ?")  # in a box, keys are letters
    assert page.get_by_label("question").input_value() == "m g h [ ?" and page.get_by_label("map", exact=True).input_value() == "colours"


def test_everything_is_reached_by_tab_and_shows_it(opened):
    page = opened("panels=2")
    page.evaluate("document.body.focus()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        label, width = page.evaluate("""() => { const e = document.activeElement; return e === document.body ? ['', ''] : [
            e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label').textContent.trim(),
            getComputedStyle(e).outlineWidth]; }""")  # fmt: skip
        if label:
            reached.add(label)
            assert width == "2px", label
    for name in ("Ask", "Block and ask again", "Own picture …", "Save as PNG", "Copy code", "?", "Close", "clear", "Show", "question", "options"):
        assert name in reached, name
    assert sum("image tokens" in label for label in reached) == 2


def test_overtaken_answers_are_dropped(opened):
    page = opened()
    count = drawn(page)
    held = """() => { let first = true; fake.held = new Promise((go) => { fake.release = go; });
        fake.delay.similar = () => first && (first = false, fake.held); }"""
    page.evaluate(held)
    asked = len(calls(page, "similar"))
    for x in (0.02, 0.5, 0.98):
        press(page, x, 0.02)
    assert drawn(page) == count
    page.evaluate("fake.release()")
    settled(page, count + 1)
    assert [call["token"] for call in calls(page, "similar")[asked:]] == [0, 10]  # what was overtaken before it was sent never is
    assert drawn(page) == count + 1 and pixel(page, 0.98, 0.02)[:3] == list(RED) != pixel(page, 0.02, 0.02)[:3]
    page.evaluate(held)
    press(page, 0.02, 0.98)
    page.keyboard.press("Escape")
    page.evaluate("async () => { fake.release(); await fake.held; }")
    page.wait_for_timeout(50)
    assert drawn(page) == count + 1  # cancelled
    press(page, 0.02, 0.02)
    settled(page, count + 2)
    press(page, 0.98, 0.02)  # seen before: needs no call
    settled(page, count + 3)
    assert [call["token"] for call in calls(page, "similar")[asked:]] == [0, 10, 77, 0]


def test_follow_pointer_previews_and_click_pins(opened):
    page = opened()
    page.get_by_label("follow pointer").check()
    pinned = info(page)
    box = page.locator(".kvx-stack").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.wait_for_function("document.querySelector('.kvx-info').innerText.includes('value +1.00')")
    assert info(page).startswith("token 0 ")
    page.mouse.move(box["x"] + 5, box["y"] - 5)
    assert info(page).split(" · ")[0] == pinned.split(" · ")[0]


def test_an_error_is_one_sentence_of_text(opened):
    page = opened()
    page.evaluate("fake.fail.similar = 'The <b>layer</b> is not there; choose another.'")
    press(page, 0.02, 0.02)
    page.wait_for_selector(".kvx-error")
    assert status(page) == "The <b>layer</b> is not there; choose another." and page.locator(".kvx-status b").count() == 0
    assert pixel(page, 0.02, 0.02)[3] == 0  # nothing that looks like an answer
    page.evaluate("fake.fail = {}")
    press(page, 0.98, 0.02)
    page.wait_for_function("document.querySelector('.kvx-status').innerText === ''")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert status(page) == "Type a question first."
    page.get_by_label("question").fill("is there a fish?")
    page.get_by_role("button", name="Block and ask again").click()
    assert "mark a region" in status(page) and calls(page, "ask") == []


def test_block_and_ask_again(opened, shots):
    page = opened("panels=2&models=2", scheme="dark")
    page.get_by_label("question").fill("is there a fish?")
    page.get_by_label("options").fill("yes, no")
    page.keyboard.press("Enter")
    page.wait_for_selector(".kvx[data-asked]")
    assert calls(page, "ask")[0] == {"panel": 0, "question": "is there a fish?", "options": ["yes", "no"], "prefix": None, "block": None}
    page.locator(".kvx-word").nth(3).click()
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('40.0 % of it on the image')")
    assert calls(page, "attention")[0] == {"panel": 0, "asked": 7, "word": 3, "layer": None, "head": None}
    assert pixel(page, 3.5 / 11, 0.05)[:3] == [0xFE, 0xE8, 0x38] and page.locator(".kvx-word").nth(3).get_attribute("aria-pressed") == "true"
    page.get_by_label("box").check()
    drag(page, (0.01, 0.01), (0.3, 0.3))
    region = [row * 11 + column for row in range(2) for column in range(3)]
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('6 keys per layer and head')")
    assert [pixel(page, 0.02, 0.02, panel=panel)[:3] for panel in (0, 1)] == [[0xFE, 0xE8, 0x38]] * 2  # the same picture: the same place
    page.get_by_label("to", exact=True).fill("2")
    page.get_by_label("key-value heads").fill("1")
    page.get_by_role("button", name="Block and ask again").click()
    page.wait_for_selector("text=with keys blocked >> nth=3")
    assert calls(page, "ask")[-1]["block"] == {"kind": "region", "share": None, "tokens": region, "layers": [0, 1, 2], "heads": [1], "seed": None}
    rows = page.locator(".kvx-bars").first.evaluate("(table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert rows[1:] == [["yes", "75.0 %", "25.0 %", "−50.0 pp"], ["no", "15.0 %", "65.0 %", "+50.0 pp"], ["any other", "10.0 %", "10.0 %", "+0.0 pp"]]
    assert page.locator(".kvx-card").first.inner_text().split() == ["as", "it", "is", "yes"]
    page.screenshot(path=shots / "view_blocked_dark.png", full_page=True)
    page.get_by_label("which").select_option("random")  # of as many keys as were painted
    page.get_by_label("seed").fill("7")
    page.get_by_role("button", name="Show").click()
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('6 keys')")
    assert {key: calls(page, "select")[-1][key] for key in ("kind", "tokens", "seed")} == {"kind": "random", "tokens": None, "seed": 7}
    page.get_by_label("key-value heads").fill("0, 5")
    page.keyboard.press("Tab")
    assert 'Heads are "all" or numbers from 0 to 1' in page.locator(".kvx-note").first.inner_text()


def test_a_button_pressed_while_a_field_has_the_focus(opened):
    page = opened()
    page.get_by_label("question").fill("is there a fish?")
    page.get_by_label("paint").check()
    press(page, 0.02, 0.02)
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('1 key per layer and head')")
    page.get_by_label("layers from").fill("9")  # no such layer: the map and its scale go
    before = page.get_by_role("button", name="Block and ask again").bounding_box()
    page.keyboard.press("Tab")
    assert "Layers are whole numbers from 0 to 5" in page.locator(".kvx-note").inner_text()
    assert page.get_by_role("button", name="Block and ask again").bounding_box() == before
    page.get_by_label("layers from").fill("1.5")
    page.get_by_role("button", name="Block and ask again").click()
    assert "found 1.5 to 5" in status(page) and calls(page, "ask") == []  # never rounded in silence
    page.get_by_label("layers from").fill("1")
    at = page.get_by_role("button", name="Block and ask again").bounding_box()
    page.mouse.move(at["x"] + 9, at["y"] + 9)
    page.mouse.down()  # what the field's change redraws may take any height
    page.evaluate("document.querySelector('.kvx-info').style.height = document.activeElement.tagName === 'INPUT' ? '' : '200px'")
    page.mouse.up()
    page.wait_for_selector("text=with keys blocked")
    assert calls(page, "ask")[0]["block"]["layers"] == [1, 2, 3, 4, 5]


def test_one_picture_painted_of_two(opened):
    page = opened("panels=2")
    page.get_by_label("question").fill("is there a fish?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".kvx-card >> nth=1")
    page.locator(".kvx-stack").nth(1).focus()
    page.keyboard.press("Space")  # no pointer needed: the middle token, as marked in the first picture, moved
    page.locator(".kvx-stack").first.focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('1 key per')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('2 keys per')")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.kvx-unit').innerText.includes('1 key per')")
    page.get_by_role("button", name="Block and ask again").click()
    page.wait_for_selector(".kvx-card >> nth=1")
    assert [call["panel"] for call in calls(page, "ask")] == [0, 1, 0]
    assert page.locator(".kvx-answer").nth(1).inner_text().startswith("Not asked: Choose “paint” or “box”")


def test_an_answer_says_what_was_asked(opened):
    page = opened()
    page.get_by_label("question").fill("is there a roof?")
    page.get_by_label("text before the image").fill("A photo.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".kvx-card")
    assert page.locator(".kvx-asked").inner_text() == "“is there a roof?” · text before the image “A photo.”"
    assert page.get_by_text("Words this model does not know: roof.").is_visible() and page.locator("h4").inner_text() == "made up 0 · model"


def test_a_strip_of_a_picture(opened):
    page = opened("width=20000&height=10&rows=2&columns=20")
    assert page.locator(".kvx-stack").bounding_box()["height"] > 30
    assert page.locator("h4").inner_text().endswith("20000 × 10 px, drawn stretched")
    press(page, 0.99, 0.8)
    page.wait_for_function("document.querySelector('.kvx-info').innerText.startsWith('token 39 ')")
    page.wait_for_function("document.querySelector('.kvx-info').innerText.endsWith('value +1.00')")
    assert pixel(page, 0.99, 0.9)[:3] == list(RED)


def test_a_kernel_that_is_gone(opened):
    page = opened()
    said = page.evaluate("""async () => { const { default: widget } = await import('/kvutils/explorer/explorer.js'), el = document.createElement('div'), on = {};
        document.body.append(el);
        let end = () => {};
        const model = { on: (name, of) => { on[name] = of; }, off() {}, send: () => end() }, gone = widget.render({ model, el });
        on.comm_live_update();  // while the picture is being read
        await new Promise((done) => setTimeout(done, 50));
        const first = el.querySelector('.kvx-status').textContent;
        end = () => { throw new Error('Cannot send'); };
        gone();
        return [first, el.querySelector('.kvx')]; }""")  # fmt: skip
    assert said == ["The kernel that read this picture is gone; run the cell again.", None]


def test_views_of_one_explorer_show_the_same_picture(opened):
    page = opened()
    found = page.evaluate("""async () => { const { default: widget } = await import('/kvutils/explorer/explorer.js'), hears = [], sent = [];
        let opened = 0;
        const model = { on: (name, of) => { if (name === 'msg:custom') hears.push(of); }, off() {}, send: async (message, _, buffers) => {
            sent.push(message);
            const { buffers: out, ...result } = await fake.backend.call(message.op, message.params, buffers), say = (...what) => hears.forEach((of) => of(...what));
            if (message.op === 'picture') opened++;
            say({ id: message.id, ok: true, result: result.panels ? { ...result, opened } : result }, out);
            if (message.op === 'picture') say({ opened });
          } }, views = [0, 1].map(() => document.createElement('div'));
        document.body.append(...views);
        for (const el of views) widget.render({ model, el });
        const titles = () => views.map((el) => el.querySelector('h4')?.textContent ?? ''), until = async (is) => {
          for (let i = 0; i < 2000 && !is(); i++) await new Promise((go) => setTimeout(go, 5)); };
        await until(() => titles().every(Boolean));
        const data = new DataTransfer(), before = sent.length;
        data.items.add(new File([new Uint8Array(9)], 'mine.png', { type: 'image/png' }));
        views[1].querySelector('.kvx-stack').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
        await until(() => titles().every((title) => title.startsWith('mine.png')) && sent.filter(({ op }) => op === 'similar').length === 4);
        return sent.slice(before).map(({ op, opened }) => `${op} ${opened}`).sort(); }""")  # fmt: skip
    assert found == ["open 0", "picture 0", "similar 1", "similar 1"]


def test_menus_offer_what_can_be_had(opened):
    page = opened("context=0")
    which = page.get_by_label("which").locator("option")
    assert which.all_inner_texts()[1:3] == ["input-agnostic keys (needs context=)", "keys of lowest variance (needs context=)"]
    assert [which.nth(i).is_disabled() for i in range(4)] == [False, True, True, False]
    choose(page, "of", "key")
    choose(page, "map", "words")
    assert page.locator(".kvx-controls").get_by_label("of", exact=True).locator("option").all_inner_texts() == ["pixels", "values"]
    page.get_by_label("words").fill("fish")
    page.keyboard.press("Enter")
    page.wait_for_function("fake.calls.some((call) => call.op === 'words')")
    assert calls(page, "words")[-1]["source"] == "value"
    page.get_by_label("question").fill("is there a roof?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("Words this model does not know: roof.").wait_for()
    assert not opened().get_by_label("which").locator("option").nth(1).is_disabled()


def test_paint_and_erase(opened):
    page = opened("tiles=1")
    page.get_by_label("paint").check()
    drag(page, (0.01, 0.09), (0.2, 0.09))
    tiles = calls(page, "select")[-1]["tokens"]
    assert tiles == [0, 1, 111, 112, 113, 114, 115]  # the base view's tokens whose centre was painted over, too
    page.get_by_label("erase").check()
    drag(page, (0.01, 0.09), (0.1, 0.09))
    assert calls(page, "select")[-1]["tokens"] == [1, 114, 115]


def test_two_panels(opened):
    page = opened("panels=2")  # two pictures of one model: what is like the token there, in both
    press(page, 0.02, 0.02, panel=1)
    page.wait_for_function("fake.calls.filter((c) => c.op === 'similar' && c.params.token === 0).length === 2")
    assert [(call["panel"], call["from"]) for call in calls(page, "similar")[-2:]] == [(0, 1), (1, 1)]
    page = opened("panels=2&models=2")  # two models of one picture: the token at that place, in each
    press(page, 0.02, 0.02)
    page.wait_for_function("fake.calls.filter((c) => c.op === 'similar' && c.params.token === 0).length === 2")
    assert [(call["panel"], call["from"]) for call in calls(page, "similar")[-2:]] == [(0, 0), (1, 1)]
    page.locator(".kvx-stack").first.focus()
    for _ in range(5):
        page.keyboard.press("]")
    assert [page.locator(".kvx-layer").nth(panel).inner_text() for panel in (0, 1)] == ["5", "4"]  # as far as it has layers
    page.get_by_label("both panels together").uncheck()
    choose(page, "map", "colours", panel=1)
    assert page.get_by_label("map", exact=True).first.input_value() == "similarity"


def test_png_and_code(opened, shots):
    page = opened("panels=2&models=2")
    press(page, 0.02, 0.02)
    page.get_by_label("opacity").fill("0.5")
    page.wait_for_function("document.querySelector('.kvx').getAttribute('aria-busy') === 'false'")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    download.value.save_as(shots / "exported.png")
    picture = np.asarray(Image.open(shots / "exported.png").convert("RGB"))
    assert picture.shape[1] == 3 * 24 + 2 * 1024 and picture.shape[0] > 768 + 100
    left, right = picture[44 + 40, 24 + 40], picture[44 + 700, 24 + 1000]
    assert np.abs(left - (np.add(RED, (0xC0, 0, 0)) / 2)).max() <= 2 and np.abs(right - (np.add(BLUE, (0, 0, 0xC0)) / 2)).max() <= 8
    bar = picture[44 + 768 + 20, [25, 24 + 1022]]
    assert (bar == [BLUE, RED]).all() and (picture[44 + 768 + 30 :, 24 : 24 + 1024] < 100).any()
    page.get_by_role("button", name="Copy code").click()
    page.wait_for_function("document.querySelector('.kvx-code').innerText.startsWith('explore(')")
    page.wait_for_function("document.querySelector('.kvx-status').innerText.includes('below')")
    assert calls(page, "code")[0]["state"]["mode"] == "similarity"
    press(page, 0.5, 0.5)
    assert page.locator(".kvx-code").is_hidden()  # that of another view
    page.get_by_label("question").fill("is there a fish?")
    page.get_by_label("options").fill("yes, no")
    page.keyboard.press("Enter")
    page.wait_for_selector(".kvx-card >> nth=1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    download.value.save_as(shots / "exported_answer.png")
    assert Image.open(shots / "exported_answer.png").height == len(picture) + 2 * 30  # question and answer


def test_own_picture_and_close(opened, tmp_path):
    page = opened()
    noise = np.random.default_rng(0).integers(0, 255, (3400, 3400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)  # more than a message may hold, and as JPEG of its size too
    page.evaluate("() => { fake.delay.picture = new Promise((go) => { fake.release = go; }); }")
    page.locator("input[type=file]").set_input_files(tmp_path / "large.png")
    page.get_by_text("Reading the picture …").wait_for()
    page.evaluate("fake.release()")
    page.get_by_role("heading", name="large.png 0").wait_for()
    page.get_by_text("sent as JPEG of 2267 × 2267 px").wait_for()
    assert 1e5 < page.evaluate("fake.bytes") < 8e6
    small = io.BytesIO()
    Image.fromarray(noise[:8, :8]).save(small, "PNG")
    drop = """([bytes, name, type]) => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], name, { type }));
        document.querySelector('.kvx-stack').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })); }"""
    page.evaluate(drop, [list(small.getvalue()), "small.png", "image/png"])
    page.get_by_role("heading", name="small.png 0").wait_for()
    page.evaluate(drop, [[1, 2], "notes.txt", "text/plain"])
    page.wait_for_selector(".kvx-error")
    assert status(page) == '"notes.txt" is not a picture; JPEG and PNG files are.'
    page.get_by_role("button", name="Close").click()
    page.get_by_text("run the cell again").wait_for()
    assert calls(page, "close") == [{}]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_readable(opened, shots, scheme):
    page = opened("panels=2", width=360, height=800, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (page.locator(".kvx-stack").nth(panel).bounding_box() for panel in (0, 1))
    assert second["y"] > first["y"] + first["height"] and first["width"] > 300
    page.screenshot(path=shots / f"view_narrow_{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 130, "height": 800})  # an output beside JupyterLab's sidebars
    edges = page.evaluate("[...document.querySelectorAll('.kvx select')].map((each) => each.getBoundingClientRect().right)")
    assert max(edges) <= 130
    light = lambda text: [float(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")]  # noqa: E731
    found = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.querySelector('.kvx'))[name])")
    linear = [np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
              for c in (np.divide(light(text), 255) for text in found)]  # fmt: skip
    assert (max(linear) + 0.05) / (min(linear) + 0.05) > 7  # WCAG's contrast AAA
    assert (linear[1] < linear[0]) == (scheme == "dark")


def test_a_backend_that_answers_less(opened):
    page = opened("ops=open+similar+colours+words")
    assert page.get_by_label("map", exact=True).locator("option").all_inner_texts() == ["similarity", "PCA colours", "words"]
    for name in ("Ask", "Block and ask again", "Own picture …", "Copy code", "Close"):
        assert page.get_by_role("button", name=name, exact=True).count() == 0 or page.get_by_role("button", name=name, exact=True).is_hidden()
    assert page.locator("datalist option").count() == 2


def test_many_tokens(opened, measured):
    page = opened("tiles=1&rows=23")  # 3,588 tokens and 46 line ends
    took = page.evaluate("""async () => { const stack = document.querySelector('.kvx-stack'), box = stack.getBoundingClientRect(), took = [];
        for (let i = 0; i < 10; i++) { const panel = document.querySelector('.kvx-panel'), before = panel.dataset.drawn, start = performance.now();
          stack.dispatchEvent(new PointerEvent('pointerdown', { clientX: box.x + 20 + 30 * i, clientY: box.y + 20 }));
          while (panel.dataset.drawn === before) await new Promise((done) => setTimeout(done));
          took.push(performance.now() - start); }
        return took.sort((a, b) => a - b); }""")  # fmt: skip
    measured.append(f"the page alone, 3,634 tokens: click to redrawn {np.median(took):.0f} ms (median of ten)")
    assert page.evaluate("fake.calls.filter((call) => call.op === 'similar').length") == 11
