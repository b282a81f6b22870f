"""Three hundred requests to the running page: its memory does not grow, and no upload is stored."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from page_client import RunningPage
from PIL import Image

FIRST, LAST, MEGABYTES = 50, 300, 50
METHODS = ("mini/r50", "mini/fastv", "divprune", "visionzip")


def held(process_id: int) -> float:
    """A process's memory in MB, in the machine's own or swapped out."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return (
        sum(int(kilobytes) for kilobytes in re.findall(r"^Vm(?:RSS|Swap):\s+(\d+) kB", status, re.M)) / 1024
    )


def photo(number: int) -> bytes:
    """A new one each time, of another size, so that nothing can be remembered."""
    draw = np.random.default_rng(number)
    pixels = draw.integers(0, 256, (200 + draw.integers(800), 200 + draw.integers(800), 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.soak
def test_three_hundred_requests_leave_the_memory_as_it_was(tmp_path):
    """Good ones with each method; every fifth is a mistake, every seventh asks for a file of the server."""
    pytest.importorskip("starlette")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    memory = {}
    with RunningPage(tmp_path) as page:
        for number in range(1, LAST + 1):
            if number % 7 == 0:
                assert page.ask("/etc/passwd")[-1]["error"]["message"] == "give a picture"
            ways = [{"choice": METHODS[number % 4]}, {"choice": METHODS[(number + 1) % 4]}]
            picture = b"no image" if number % 5 == 0 else photo(number)
            last = page.ask(picture, f"how many digits ? {number}", ways)[-1]
            if number % 5 == 0:
                assert "no known format" in last["error"]["message"]
            else:
                assert last["done"][0] == 2
            memory[number] = held(page.process.pid)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "log.txt"]
        log = page.log()
    grown = memory[LAST] - memory[FIRST]
    after = ", ".join(f"{number}: {memory[number]:.0f}" for number in (1, FIRST, LAST))
    print(f"\nMB after request {after}; grown by {grown:.1f}")
    assert grown <= MEGABYTES and not files and "Traceback" not in log
