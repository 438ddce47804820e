"""The pictures of the playground in docs/how-to/serve.md: light, dark, and on a phone.

eellm serve models/english                       in one terminal
python examples/playground_screenshots.py        in another; needs chromium, chromium-driver, selenium, pillow
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
SHOTS = {"light": (1120, 1430), "dark": (1120, 1430), "phone": (390, 844)}


@contextmanager
def browser(downloads: Path | None = None) -> Iterator[Chrome]:
    """Debian's chromium, with a profile that is empty before and gone after."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if downloads is not None:
            options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, width: int, height: int) -> None:
    """The page's size, not the window's, which can't be as narrow as a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Chrome, **features: str) -> None:
    """prefers-color-scheme and the like, as `color_scheme="dark"`."""
    named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


def is_done(driver: Chrome) -> bool:
    return driver.find_element(By.ID, "status").text.startswith("Done")


def shoot(driver: Chrome, url: str, name: str, path: Path) -> None:
    resize(driver, *SHOTS[name])
    prefer(driver, color_scheme="dark" if name == "dark" else "light", reduced_motion="reduce")
    driver.get(url)
    wait = WebDriverWait(driver, 60)
    wait.until(lambda _: driver.find_element(By.ID, "generate").is_enabled())
    slider = "threshold.value = 0.2; threshold.dispatchEvent(new Event('input'))"  # low, for more exits to be seen
    driver.execute_script(slider)
    if name != "phone":
        driver.find_element(By.ID, "compare").click()
    for _ in range(2):  # the first time things are still cold
        driver.find_element(By.ID, "generate").click()
        wait.until(is_done)
    tokens = driver.find_elements(By.CSS_SELECTOR, "article:first-child .token")
    telling = [token for token in tokens if token.get_attribute("data-exit") == "6"] or tokens
    driver.execute_script("arguments[0].focus({preventScroll: true})", telling[0])
    if name == "phone":
        driver.execute_script("document.querySelector('.answer').scrollIntoView()")
    picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(128).save(path, optimize=True)  # a third of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        for name in SHOTS:
            shoot(driver, args.url, name, args.out / f"playground-{name}.png")


if __name__ == "__main__":
    main()
