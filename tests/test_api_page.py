"""docs/api.md is what the docstrings say now."""

import importlib.util
import re

import ssld
from tests.docs_sandbox import ROOT


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_api_page", ROOT / "docs" / "make_api_page.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == module.page(), "run python docs/make_api_page.py"


def test_every_function_is_on_it_and_its_code_is_python() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### ssld\.(\w+)$", page, flags=re.MULTILINE)) == set(ssld.__all__)
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, "docs/api.md", "exec")
