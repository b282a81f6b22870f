"""How far a piece of work goes through the project; `python tests/walk.py` prints it."""

import pytest
import walk

# What was measured, borders (744) with a little room. A new file on the way, or many more calls from file
# to file, are a reason to look, not a fault.
ATTACH_FILES, ATTACH_BORDERS = 31, 770
CELL_FILES = 49  # of which a compressed answer enters 19


def files_of(one: walk.Walk) -> str:
    return f"{len(one.files)} files: {', '.join(sorted(one.files))}"


def test_an_attached_generation_goes_no_further_than_it_did():
    attached = walk.attached_generation()
    assert attached.parses == 0
    assert len(attached.files) <= ATTACH_FILES, files_of(attached)
    assert attached.borders.total() <= ATTACH_BORDERS, attached


@pytest.mark.slow  # the whole benchmark is written
def test_a_cell_of_a_table_parses_its_row_once_and_no_other():
    cell = walk.table_cell()
    assert cell.parses == 1
    assert "eval/harness.py" in cell.files and "libra/lmms/models_llava.py" in cell.files
    assert len(cell.files) <= CELL_FILES, files_of(cell)
    assert cell.borders["eval/plan.py", "eval/cells.py"]
