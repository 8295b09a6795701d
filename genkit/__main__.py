"""`python -m genkit` is the command `genkit`."""

import sys

from genkit.cli.main import main

sys.exit(main())
