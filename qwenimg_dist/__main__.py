"""`python -m qwenimg_dist`, which is what `ray job submit` runs."""

import sys

from qwenimg_dist.commands.main import main

sys.exit(main())
