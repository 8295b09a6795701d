"""The command `genkit`: one file per command.

A module of this package whose name does not begin with an underscore (and is not `main`) is a command of that name. It defines
`HELP` (one line), `add_arguments(parser)` and `run(args) -> int` (the exit code), and imports nothing heavy at its top:
`genkit --help` and argument errors must not wait for torch.
"""
