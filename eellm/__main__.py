"""`python -m eellm` is `eellm`."""

import sys

from eellm.cli.main import main

sys.exit(main())
