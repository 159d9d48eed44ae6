"""Several processes of a run played by threads: each thread has its own connection."""

import socket
import threading
from collections.abc import Callable
from typing import Any

from neva_jax.parallel.peers import Star


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def together(count: int, work: Callable[[Star], Any]) -> list[Any]:
    """`work` of all processes at once, each with its `Star`; what they return, or the first error."""
    address, results, errors = free_address(), [None] * count, []

    def one(index: int) -> None:
        try:
            star = Star(address, index, count, start_timeout=20, end=lambda *said: errors.append(said))
            results[index] = work(star)
            star.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    return results
