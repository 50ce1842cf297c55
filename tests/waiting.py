"Waiting for other processes, threads and pages"
import time


def until(condition, seconds=300, every=.01):
    "Wait until something is found, and return it"
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every)
    return found
