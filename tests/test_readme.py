"""The README's table of settings is that of the code."""

from pathlib import Path

from pipeline.config import FIELDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_readme_lists_every_setting_with_its_default() -> None:
    rows = {
        cells[1].strip(" `"): cells[2].strip()
        for cells in (line.split("|") for line in README.splitlines() if line.startswith("| `"))
        if cells[1].strip(" `") in FIELDS
    }
    assert list(rows) == list(FIELDS)
    for name, field in FIELDS.items():
        if name != "adapter_root":  # its default depends on where the project lies
            default = "" if field.default == () else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            assert rows[name] == (default or "empty"), name
