"""The one exception whose text is meant for the user."""


class UserError(Exception):
    """Bad input: one line that names the file, flag or key at fault and says how to mend it.

    The command line prints it on stderr and exits with code 2, without a traceback. Library users
    catch it as any exception.
    """
