"""What test_processes.py lets processes do; a module of its own, so that they need not import the tests."""

import os


def power(base, exponent):
    return base**exponent


def die_at(fatal, number):
    if number == fatal:
        os._exit(3)
    return number


def divide(one, other):
    return one / other
