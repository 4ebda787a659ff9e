"""`python -m analysis.capabilities` writes docs/capabilities.md; with pytest arguments it only tests what they name."""

import sys

import pytest

if __name__ == "__main__":
    write = ["--capabilities", "docs/capabilities.md"]
    sys.exit(pytest.main(["tests/compatibility", "-m", "", *(sys.argv[1:] or write)]))
