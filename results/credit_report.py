"""Tables and figures of results/credit.py. To follow."""


def write(runs):
    pass
