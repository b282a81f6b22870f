"""Three hundred requests to the running page: its memory and its uploads do not grow."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from page_client import RunningPage
from PIL import Image

FIRST, LAST, MEGABYTES = 50, 300, 50
METHODS = ("mini/r50.yaml", "mini/fastv.yaml", "mini/turbo.yaml", "mini/random.yaml")


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
    pytest.importorskip("gradio")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    memory = {}
    with RunningPage(tmp_path) as page:
        for number in range(1, LAST + 1):
            upload = page.upload(b"no image" if number % 5 == 0 else photo(number), f"{number}.jpg")
            if number % 7 == 0:
                assert page.join([{"path": "/etc/passwd"}, "what ?", METHODS[0], "libra", "2", 0.5])[0] == 403
            answer, *_, remark, _, _ = page.ask(
                {"path": upload}, f"how many digits ? {number}", METHODS[number % 4]
            )["data"]
            assert (
                ("no known format" in remark["value"]) == (number % 5 == 0) == (not isinstance(answer, str))
            )
            memory[number] = held(page.process.pid)
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "log.txt"]
        size = sum(path.stat().st_size for path in files) / 2**20
        log = page.log()
    grown = memory[LAST] - memory[FIRST]
    after = ", ".join(f"{number}: {memory[number]:.0f}" for number in (1, FIRST, LAST))
    print(f"\nMB after request {after}; grown by {grown:.1f}; {len(files)} uploads of {size:.0f} MB")
    assert grown <= MEGABYTES and size <= 256 and "Traceback" not in log
