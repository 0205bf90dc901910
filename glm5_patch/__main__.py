"""``python -m glm5_patch``."""

import sys

from .cli import main

sys.exit(main())
