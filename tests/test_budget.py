"""The budget in docs/performance.md is what `python -m fused_beit.engine.planning.budget` prints."""

import re

import pytest

from fused_beit.engine.planning.budget import by_part, by_shape

BLOCK = r"<!-- budget {}: begin -->\n(.*?)<!-- end -->"


@pytest.mark.parametrize("table", [by_part, by_shape], ids=lambda table: table.__name__)
def test_the_page_shows_the_table_that_is_counted(root, table):
    page = (root / "docs" / "performance.md").read_text()
    (shown,) = re.findall(BLOCK.format(table.__name__), page, re.DOTALL)
    assert shown.split("\n") == ["", *table(), "", ""], "run python -m fused_beit.engine.planning.budget"
