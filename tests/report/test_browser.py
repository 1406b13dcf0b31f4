"""The report in a real browser: Debian's chromium and its driver, headless."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.report.page import write_report
from tests.report.test_page import RECORD, run_folder

if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
    pytest.skip("needs Debian's packages chromium and chromium-driver", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def records(groups: int) -> list[dict[str, Any]]:
    """4 rollouts a group: every third group all right, all wrong, mixed; peaks rise with the group."""
    made = []
    for group in range(groups):
        for member in range(4):
            reward = (1.0, 0.0, float(member % 2))[group % 3]
            peak = 0.1 + group / groups
            made.append(
                RECORD
                | {"step": group // 4, "group": group, "reward": reward, "prompt": f"prompt {group}"}
                | {"entropies": [0.0, 0.01 * member, 0.0, peak, peak], "clip": [int(i <= member) for i in range(5)]}
            )
    return made


def clip_shown(browser: Any) -> list[int]:
    tokens = browser.find_elements(By.CSS_SELECTOR, "#rollout .token")
    return [int("clip" in token.get_attribute("class").split()) for token in tokens]


def test_filter_sort_keys_and_the_clip(browser: Any, tmp_path: Path) -> None:
    kept = records(12)
    write_report([run_folder(tmp_path, *kept)], tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    assert len(browser.find_elements(By.CSS_SELECTOR, ".group")) == 12
    assert clip_shown(browser) == kept[0]["clip"]

    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert clip_shown(browser) == kept[2]["clip"] == [1, 1, 1, 0, 0]
    body.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert clip_shown(browser) == kept[5]["clip"]
    assert "prompt 1" in browser.find_element(By.ID, "rollout").text
    texts = [token.text for token in browser.find_elements(By.CSS_SELECTOR, "#rollout .token")]
    assert texts == ["a", "</script><script>alert(1)</script>", "⏎", "A:", "3"]  # data, not markup

    Select(browser.find_element(By.ID, "filter")).select_by_visible_text("mixed")
    Select(browser.find_element(By.ID, "sort")).select_by_visible_text("peak entropy")
    assert browser.find_element(By.ID, "count").text == "4 of 12 groups"
    prompts = [row.text for row in browser.find_elements(By.CSS_SELECTOR, ".group .prompt")]
    assert prompts == ["prompt 11", "prompt 8", "prompt 5", "prompt 2"]
    peaks = browser.find_elements(By.CSS_SELECTOR, ".step.peak")
    assert len(peaks) == 1 and "A:3" in peaks[0].text


def test_two_thousand_rollouts_open_fast(browser: Any, tmp_path: Path) -> None:
    write_report([run_folder(tmp_path, *records(500))], tmp_path / "report.html")
    start = time.monotonic()
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_element(By.ID, "count").text == "500 of 500 groups"
    print(f"opened 2,000 rollouts in {time.monotonic() - start:.2f} s")
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_DOWN)
    assert "prompt 1" in browser.find_element(By.ID, "rollout").text
