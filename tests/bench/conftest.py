"""`bench` is not part of the package: it is imported from the source tree."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end, so that an installed fastlm is still the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[2]))
