import functools


def eager_break_during_capture(function):
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        return function(*arguments, **named)

    wrapper.breaks_capture = True
    return wrapper
