"""The page of theory leaves out no loss, and links to pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpo.objective.catalog import LOSSES

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "theory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_place_in_the_theory(name):
    assert f"`{name}`" in TEXT.split("## The place of each loss")[1]


def test_the_theory_links_to_pages_that_exist():
    pages = re.findall(r"\]\(([\w.]+\.md)\)", TEXT)
    assert len(pages) >= 3 and all((DOCS / page).is_file() for page in pages)
