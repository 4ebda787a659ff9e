"""Run in an engine's environment: what `answer` of its script returns, with versions and seconds."""

import json
import runpy
import sys
import time
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    script, asked, answered, *packages = sys.argv[1:]
    answer = runpy.run_path(script)["answer"]
    began = time.perf_counter()
    found = answer(json.loads(Path(asked).read_text()))
    found |= {"versions": {name: version(name) for name in packages}, "seconds": time.perf_counter() - began}
    Path(answered).write_text(json.dumps(found))
