"""Every mistake a user can make ends in one of these exceptions.

A message is one line that names the file, the field, the value and the way out. The command line
prints it without a traceback and exits with status 2; everything else propagates as a bug.
"""


class SquatError(Exception):
    """Bad input: the message says what is wrong, where, and how to put it right."""


class ConfigError(SquatError):
    """A quantization config or a recipe that asks for something that does not exist."""


class DataError(SquatError):
    """A corpus, tokenizer or evaluation file that cannot be used."""


class CheckpointError(SquatError):
    """A checkpoint that is missing, cut short, or not of the kind that was asked for."""


class ParityError(SquatError):
    """A file that does not compute what its checkpoint does."""


class EngineError(SquatError):
    """The C++ engine refused a file, an input or a setting."""


class FormError(EngineError):
    """A form that no answer can be held to."""


class ChatError(SquatError):
    """A conversation that a model's chat template makes no prompt of, or a file without a template."""


class ToolsError(ChatError):
    """Tools that a model's chat template cannot tell it of, or whose calls could not be read."""


class ServingError(SquatError):
    """A server that cannot begin to serve."""


class UnfinishedError(SquatError):
    """Training stopped as it was asked to, with a checkpoint; running it again goes on."""


class DivergedError(SquatError):
    """Training left the finite numbers; what was saved before is intact."""
