"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """Bad input, said in one clear sentence: what is wrong, where, and what to do about it.

    Recipes print the sentence and exit with a non-zero code, without a traceback
    (``LIT_LLM_TRACEBACK=1`` shows it).
    """
