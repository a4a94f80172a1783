"""docs/dataset_format.md lists every code that the reader of datasets can report, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATASET = ROOT / "sdft_engine" / "contract" / "dataset.py"
REPORTED_BY_THE_FILE_SERVICE = {"invalid_n_examples"}


def codes_in_the_source() -> set[str]:
    """The second argument of every DatasetProblem(line, code, …) and of every report(line, code, …), conditional ones included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(DATASET.read_text())):
        if isinstance(node, ast.Call) and len(node.args) == 3:
            found |= {value.value for value in ast.walk(node.args[1]) if isinstance(value, ast.Constant) and isinstance(value.value, str)}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "code":
            found |= {node.value.body.value, node.value.orelse.value}  # type: ignore[attr-defined]
    return {code for code in found if re.fullmatch(r"[a-z_]+", code)}


def codes_in_the_documentation() -> set[str]:
    table = (ROOT / "docs" / "dataset_format.md").read_text().split("| code | what is wrong |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| `([a-z_]+)` \|", table, flags=re.MULTILINE))


def test_every_problem_code_is_documented() -> None:
    documented, reported = codes_in_the_documentation(), codes_in_the_source()
    assert len(reported) > 15
    assert documented == reported | REPORTED_BY_THE_FILE_SERVICE
