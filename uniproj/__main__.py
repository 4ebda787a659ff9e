"""`python -m uniproj`."""

from uniproj.cli import main

raise SystemExit(main())
