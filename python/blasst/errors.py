"""The one error that is not Python's own.

An argument of the wrong type is a TypeError, one of the wrong value a ValueError.
"""


class NotSupportedError(NotImplementedError, ValueError):
    """What was asked for makes sense, and blasst does not do it.

    Also a ValueError, so that whoever tries an attention implementation can catch one type.
    """
