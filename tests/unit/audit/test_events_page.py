"""docs/audit-events.md says what the catalogue says."""

from pathlib import Path

from appliance.audit.events import documentation

PAGE = Path(__file__).parents[3] / "docs" / "audit-events.md"


def test_the_page_is_made_from_the_catalogue() -> None:
    how = 'python -c "from appliance.audit.events import documentation; print(documentation(), end=str())"'
    assert PAGE.read_text(encoding="utf-8") == documentation(), f"write it anew: {how} > docs/audit-events.md"
