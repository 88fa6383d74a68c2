"""`python -m snello` is `snello`."""

from __future__ import annotations

import sys

from snello.cli import main

sys.exit(main())
