"""Pages in Chromium: on a phone and on a desktop, light and dark, by keyboard and for screen readers.

`python -m tests.clients.test_page out/smollm2/adapter` takes the pictures in docs/pictures anew; the adapter is the demo's.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

import peftc
from peftc.view.heat import Change, adapter_page
from tests.support.browser import SIZES, WHERE_FROM, chromium, loading_ms, opened
from tests.support.command import peftc as peftc_command
from tests.support.plans import SEVEN, golden_plans, meta_llama

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"
Q_PROJ = "model.layers.{4–79}.self_attn.q_proj"


def pages() -> dict[str, str]:
    """Pages of all kinds, by name."""
    model = meta_llama(80, 8192, 28672, dtype=torch.bfloat16).to(torch.bfloat16)
    ranks = {rf"layers\.{layer}\..*": 4 + layer for layer in range(80)}
    plans = golden_plans()
    one = plans["llama70b"]
    few = peftc.LoraConfig(r=32, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"])
    return {
        "plan": one.to_html(model=model),
        "every layer another": peftc.plan(model, peftc.LoraConfig(target_modules=SEVEN, rank_pattern=ranks)).to_html(),
        "two": one.to_html(peftc.plan(model, few), model=model),
        "misses": plans["misses"].to_html(),
        "prompts": plans["prompts"].to_html(),
        "adapter": trained(),
    }


def trained() -> str:
    """An adapter that changes later layers more, with a spectrum that falls."""
    generator = torch.Generator().manual_seed(0)
    changes: list[Change] = []
    for layer in range(30):
        for at, name in enumerate(SEVEN):
            module = "mlp" if at > 3 else "self_attn"
            size = (0.2 + layer / 20) * (1.2 - at / 8) * (0.8 + 0.4 * torch.rand((), generator=generator).item())
            spectrum = tuple((size * torch.logspace(0, -1 - at / 4, 16)).tolist())
            norm = sum(value**2 for value in spectrum) ** 0.5
            changes.append(
                Change(f"model.layers.{layer}.{module}.{name}", norm, 4.0 + at, spectrum, {"r": 16, "alpha": 32})
            )
    changes.append(Change("lm_head", 0.9, 1.0, (0.9,)))
    facts = [("method", "LORA"), ("parameters", "4,884,480"), ("integrity", "config and tensors are what was saved")]
    beside = ["base_model.model.a_module_that_has_a_long_name.base_layer.weight 256×96"]
    return adapter_page("support-replies", facts, {}, changes, beside)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        if found is None:
            pytest.skip(WHERE_FROM)
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name.replace(' ', '-')}.html" for name in pages()}
    for name, text in pages().items():
        found[name].write_text(text, encoding="utf-8")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["plan", "two", "misses", "prompts", "adapter"])
def test_pages_fit_and_can_be_read(browser: Browser, files: dict[str, Path], name: str, size: str, scheme: str) -> None:
    with opened(browser, files[name], size, scheme) as (page, said, asked):
        if name != "adapter":
            page.click("#unfold")
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert broken(page) == []
        assert said == []
        assert asked == [files[name].as_uri()]


def broken(page: Page) -> list[str]:
    """The rules of WCAG 2.2 A and AA that axe finds broken: contrast, names, roles, order, sizes of targets."""
    wanted = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": wanted}})
    return [
        f"{rule['id']}: {[node['html'][:200] for node in rule['nodes']][:3]}" for rule in found.response["violations"]
    ]


@pytest.mark.parametrize("name", ["plan", "every layer another", "two", "adapter"])
def test_pages_open_in_less_than_a_second(browser: Browser, files: dict[str, Path], name: str) -> None:
    """The best of three: others may use the machine. benchmarks/page.py has the figures."""
    times: list[float] = []
    for _ in range(3):
        with opened(browser, files[name]) as (page, _, _):
            times.append(loading_ms(page))
    assert min(times) < 1000


def focused(page: Page) -> str:
    """The place of the branch that has the focus."""
    return page.evaluate("document.activeElement.closest('li')?.dataset.p ?? document.activeElement.id")


def shown(page: Page) -> list[str]:
    """The places of the branches that can be seen."""
    return page.evaluate(
        "[...document.querySelectorAll('#places li')].filter(e => e.checkVisibility()).map(e => e.dataset.p)"
    )


def around(place: str | None) -> Iterator[str]:
    """The root, the modules around a place, and the place; nothing for None."""
    if place is not None:
        parts = place.split(".")
        yield from (".".join(parts[:end]) for end in range(len(parts) + 1))


def test_the_tree_by_keyboard(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["plan"]) as (page, _, _):
        page.keyboard.press("/")
        assert focused(page) == "search"
        page.locator("summary").first.focus()
        assert focused(page) == ""
        for key, place in [
            ("ArrowDown", "model"),
            ("ArrowDown", "model.layers"),
            ("ArrowRight", "model.layers.{0–3}"),
            ("ArrowLeft", "model.layers.{0–3}"),  # It folds.
            ("ArrowDown", "model.layers.{4–79}"),
            ("ArrowRight", "model.layers.{4–79}.self_attn"),
            ("ArrowRight", Q_PROJ),
            ("Home", ""),
            ("End", "model.layers.{4–79}.mlp.down_proj"),
            ("ArrowLeft", "model.layers.{4–79}.mlp"),
            ("ArrowUp", "model.layers.{4–79}.self_attn.o_proj"),
        ]:
            page.keyboard.press(key)
            assert focused(page) == place, key
        detail = page.locator(f"[data-p='{Q_PROJ.replace('q_proj', 'o_proj')}'] .detail")
        assert not detail.is_visible()
        page.keyboard.press("Enter")
        assert detail.is_visible()
        assert "lora_A" in detail.inner_text()


def test_search_looks_into_groups_and_puts_folds_back(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["plan"]) as (page, _, _):
        before = shown(page)
        for query, place, told in [
            ("layers.17.self_attn.q", Q_PROJ, "1 place"),
            ("layers.2.self_attn.q_proj", "model.layers.{0–3}.self_attn.q_proj", "1 place"),
            ("layers.80", None, "0 places"),
            ("Q_PROJ lora", ..., "2 places"),
            ("LlamaRMSNorm", ..., "5 places"),
        ]:
            page.fill("#search", query)
            assert page.inner_text("#found") == told, query
            if place is not ...:
                assert shown(page) == [*around(place)]
        page.keyboard.press("Escape")
        assert shown(page) == before
        assert page.inner_text("#found") == ""


def test_what_is_adapted_and_what_differs_alone(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["plan"]) as (page, _, _):
        assert "lm_head" in shown(page)
        page.check("#only")
        assert "lm_head" not in shown(page)
        assert "model.layers.{4–79}.mlp" in shown(page)
        page.click("#fold")
        assert shown(page) == [""]
    with opened(browser, files["two"]) as (page, _, _):
        page.check("#only")
        page.click("#unfold")
        assert "lm_head" not in shown(page)
        assert page.locator("#places li.differs").count() == len(shown(page))


@pytest.mark.parametrize("name", ["plan", "two"])
def test_a_phone_shows_the_measure_that_is_chosen(browser: Browser, files: dict[str, Path], name: str) -> None:
    with opened(browser, files[name], "phone") as (page, _, _):
        numbers = page.locator("summary").first.locator(".num:visible")
        count = 2 if name == "two" else 1
        assert numbers.count() == count
        assert numbers.first.inner_text().startswith("205,914,112")
        page.check("[value=bytes]")
        assert numbers.count() == count
        assert numbers.first.inner_text().startswith("785.5 MiB")


def test_what_a_screen_reader_says(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["plan"]) as (page, _, _):
        page.click("#unfold")
        tree: Any = page.locator(f"[data-p='{Q_PROJ}']").aria_snapshot()
        assert "q_proj ×76" in tree
        assert "lora @output · r 16 · alpha 32" in tree
        assert "19,922,944 parameters" in tree
        assert 'img "What lora computes here: ' in tree
        assert "linear of x, lora_A" in tree
        assert 'columnheader "shape"' in tree
        headings = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName + ' ' + e.textContent)"
        )
        assert headings[:5] == [
            "H1 LlamaForCausalLM",
            "H2 Costs",
            "H2 What needs your eye",
            "H2 The model",
            "H2 Layer by layer",
        ]
    with opened(browser, files["adapter"]) as (page, _, _):
        rows: Any = page.locator("#heat").aria_snapshot()
        assert 'rowheader "layer 29"' in rows
        assert 'columnheader "self_attn.q_proj"' in rows


def test_the_heat_map_by_keyboard_and_mouse(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["adapter"]) as (page, _, _):
        heading = page.locator("#spectrum h3")
        norms = [float(text) for text in page.locator("#heat button").all_inner_texts()]
        # The largest is chosen to begin with, and is the one stop of the Tab key.
        assert float(page.inner_text("#heat [aria-pressed=true]")) == max(norms)
        assert page.locator("#heat button[tabindex='0']").count() == 1
        page.locator("#heat button").first.click()
        assert heading.inner_text() == "model.layers.0.self_attn.q_proj"
        for key, name in [
            ("ArrowRight", "0.self_attn.k_proj"),
            ("ArrowDown", "1.self_attn.k_proj"),
            ("End", "1.mlp.down_proj"),
            ("ArrowRight", "1.mlp.down_proj"),  # There is nothing beyond.
            ("ArrowUp", "0.mlp.down_proj"),
            ("Home", "0.self_attn.q_proj"),
        ]:
            page.keyboard.press(key)
            assert heading.inner_text() == f"model.layers.{name}", key
        bars = page.locator("#spectrum rect")
        assert bars.count() == 16
        tall = [float(bar.get_attribute("height") or 0) for bar in bars.all()]
        assert tall == pytest.approx((100 * torch.logspace(0, -1, 16)).tolist(), rel=2e-3)
        assert "effective rank 4 of 16; 90 % of the squared norm in the first 8" in page.inner_text("#spectrum")


def test_without_scripts_all_is_there(browser: Browser, files: dict[str, Path]) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(files["plan"].as_uri())
    page.locator(f"[data-p='{Q_PROJ}'] summary").click()
    assert page.locator(f"[data-p='{Q_PROJ}'] svg").is_visible()
    page.close()


def take_pictures(adapter: str) -> None:
    """Write the pictures of the documents."""
    found = pages()
    fold = "document.querySelector(`[data-p='model.layers.{0–3}'] details`).open = false;"
    unfold = f"document.querySelector(`[data-p='{Q_PROJ}'] details`).open = true;"
    scroll = "document.querySelector(`[data-p='model.layers.{4–79}.self_attn']`).scrollIntoView()"
    with chromium() as browser, TemporaryDirectory() as folder:
        assert browser is not None, WHERE_FROM
        file = Path(folder) / "page.html"
        for name, page_name, size, scheme, act in [
            ("plan", "plan", "desktop", "light", fold + unfold + "scrollTo(0, 235)"),
            ("plan-phone", "plan", "phone", "dark", unfold + scroll),
            ("plans", "two", "desktop", "dark", ""),
            ("adapter", "", "desktop", "light", ""),
        ]:
            if page_name:
                file.write_text(found[page_name], encoding="utf-8")
            else:
                peftc_command("inspect", adapter, "--html", file)
            with opened(browser, file, size, scheme) as (page, _, _):
                page.evaluate(act)
                page.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    take_pictures(*sys.argv[1:])
