"""How far a piece of work goes through the project; `python tests/walk.py` prints it."""

import pytest
import walk

# Measured; of them a compressed answer alone enters 19. A new file on the way is a reason to look, not a
# fault.
CELL_FILES = 46


@pytest.mark.slow  # the whole benchmark is written
def test_a_cell_of_a_table_parses_its_row_once_and_no_other():
    cell = walk.table_cell()
    assert cell.parses == 1
    assert "eval/harness.py" in cell.files and "libra/lmms/models_llava.py" in cell.files
    assert len(cell.files) <= CELL_FILES, f"{len(cell.files)} files: {', '.join(sorted(cell.files))}"
    assert cell.borders["eval/plan.py", "eval/cells.py"]
