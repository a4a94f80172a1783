import subprocess
import sys
from pathlib import Path

FORBIDDEN = ("torch", "transformers", "peft", "safetensors")


def test_api_never_imports_torch() -> None:
    program = f"import sys, api.app; print([name for name in {FORBIDDEN} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_application_touches_no_file(tmp_path: Path) -> None:
    program = "import api.app; assert api.app.app.title == 'sdft'"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=True)
    assert list(tmp_path.iterdir()) == []
