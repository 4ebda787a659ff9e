"""Golden checksums: P is part of every result, so the same arguments give the same P in every later version.

`python -m tests.test_golden NAME` makes those of a new projection anew, which is not part of any result yet.
"""

import json
import sys
from pathlib import Path

import pytest

from uniproj import LoRALayout, get, names
from uniproj.testing import sample

GOLDEN = Path(__file__).parent / "golden" / "checksums.json"
LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (24, 16) for i in (2, 10) for m in ("q", "v")}, r=3)


def checksums() -> dict[str, str]:
    large = sample("unilora", LoRALayout.flat(393_216), 23_040)  # more rows than the checksum reads
    return {"unilora v2 at D = 393216": large.checksum()} | {
        f"{name} v{get(name).version} {dict(variant)} seed {seed}": sample(name, LAYOUT, 40, seed, **variant).checksum()
        for name in names()
        for variant in get(name).variants
        for seed in (0, 2**33 + 5)
        if not (variant.get("assignment") == "iid" and seed)
    }


def test_golden_checksums() -> None:
    """A new projection adds its line (the message shows it); a line that exists never changes within a version."""
    expected, found = json.loads(GOLDEN.read_text()), checksums()
    assert {k: found.get(k) for k in expected} == expected
    new = {k: v for k, v in found.items() if k not in expected}
    if new:
        pytest.fail(f"add to {GOLDEN.name}: {json.dumps(new, indent=2)}")


if __name__ == "__main__":
    kept = {key: value for key, value in json.loads(GOLDEN.read_text()).items() if key.split()[0] not in sys.argv[1:]}
    GOLDEN.write_text(json.dumps({**kept, **{k: v for k, v in checksums().items() if k not in kept}}, indent=2) + "\n")
