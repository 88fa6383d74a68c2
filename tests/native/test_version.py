"""What is stored on disk is bound to the bits of the core: other bits need another `NUMERICS_VERSION`."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from snello.engine.native import NativeExecutor
from snello.models import load
from snello.models.spec import Deployment
from snello.native import core
from tests.native.test_linear import int4_weights

DIGESTS = {1: "?"}
