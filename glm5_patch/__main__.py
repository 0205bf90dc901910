"""``python -m glm5_patch``."""

import sys

from .tools.cli import main

sys.exit(main())
