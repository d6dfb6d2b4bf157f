"""The one exception that means "you can mend this": it names the thing and says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class LabError(ValueError):
    """A mistake of the user in a name, a setting, a file or a shape, described in one line.

    The command line prints it without a traceback and exits with status 2; the page shows it as a notice.

    Example:
        >>> import rrepa_lab as rl
        >>> try:
        ...     rl.load("digits-revers")
        ... except rl.LabError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        unknown run 'digits-revers'; did you mean 'digits-reverse'...
    """

    def __str__(self) -> str:
        # names of files may be any bytes: those that are no text are written as \\udcff, so that all can be printed
        return super().__str__().encode("utf-8", "backslashreplace").decode("utf-8")


class ReportedElsewhere(LabError):
    """An error of all of several processes, which another one reports."""


class LabWarning(UserWarning):
    """What is done all the same, but may not be what was meant; the command line prints it as a note."""


def unknown(kind: str, given: object, known: Iterable[str]) -> LabError:
    """The error for a name that is not among the known ones, with the nearest ones offered."""
    names = [str(name) for name in known]
    near = get_close_matches(str(given), names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names) or 'none'}"
    return LabError(f"unknown {kind} {str(given)!r}; {hint}")
