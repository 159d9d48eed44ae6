"""What processes say to each other, and what each reads of a batch; the processes are threads with connections."""

import os
import queue
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from neva_jax.data.pipeline import Share, batches, plan_rows
from neva_jax.errors import UserError, WorkerError
from neva_jax.parallel.peers import ALONE, Star, split_address
from tests.data.rows import SIZE, assert_same, conversation, write_rows
from tests.parallel.stars import free_address, together

# --- the star --------------------------------------------------------------------------------------------------------


def test_values_come_to_all_in_the_order_of_the_processes():
    def work(star):
        return [star.exchange({"round": i, "from": star.index}) for i in range(3)]

    expected = [[{"round": i, "from": index} for index in range(3)] for i in range(3)]
    assert together(3, work) == [expected] * 3


def test_the_first_value_that_is_not_none_counts():
    assert together(3, lambda star: (star.any(None), star.any(15 if star.index else None))) == [(None, 15)] * 3


def test_the_first_process_is_done_before_the_others_begin():
    order = []

    def work(star):
        return star.after_first(lambda: (time.sleep(0.1 * star.first), order.append(star.index))[1])

    together(3, work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_a_disagreement_is_told_by_all():
    def work(star):
        star.agree(1, "one")
        with pytest.raises(UserError) as error:
            star.agree(min(star.index, 1), "the step")
        return str(error.value)

    assert together(3, work) == ["the step: 1 in process 1, 0 in process 0"] * 3


def test_one_process_alone_agrees_with_itself():
    assert ALONE.exchange(3) == [3]
    assert ALONE.any(None) is None
    assert ALONE.after_first(lambda: 5) == 5
    ALONE.agree(1, "")


class Ends:
    """What each process is told when it must end."""

    def __init__(self):
        self.queues = {}

    def start(self, address, index, count, **settings):
        """A process, or its error; `queues[index]` gets (status, message) of its end."""
        self.queues[index] = queue.Queue()
        settings = {"start_timeout": 20, **settings}
        return Star(address, index, count, **settings, end=lambda i, *said: self.queues[i].put(said))

    def start_all(self, count, **settings):
        address, stars = free_address(), {}

        def one(index):
            stars[index] = self.start(address, index, count, **settings)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return address, stars

    def of(self, index, seconds=10):
        return self.queues[index].get(timeout=seconds)


def say(address, text):
    """Sends something to an address as soon as somebody listens there; returns the connection."""
    while True:
        try:
            connection = socket.create_connection(split_address(address), timeout=5)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    connection.sendall(text)
    return connection


def vanish(star):
    """As the kernel does to a process that is killed."""
    star._closed = True  # the thread that stands for it ends in silence
    star._socket.shutdown(socket.SHUT_RDWR)


def test_a_process_whose_connection_is_gone_is_named():
    ends = Ends()
    _, stars = ends.start_all(3)
    vanish(stars[1])
    said = f"error: process 1 of 3 ({socket.gethostname()}, process id {os.getpid()}) has died (its connection is gone)"
    for index in (0, 2):
        status, message = ends.of(index)
        assert (status, message) == (1, f"{said}; the same command continues from the last checkpoint")


def test_a_process_that_falls_silent_is_named():
    ends = Ends()
    _, stars = ends.start_all(2, timeout=1.0)
    stars[1]._closed = True  # no beats any more
    status, message = ends.of(0)
    assert status == 1
    assert "process 1 of 2" in message
    assert "has died (not heard of for 1 seconds)" in message


def test_an_error_ends_all_with_its_status_and_message():
    ends = Ends()
    _, stars = ends.start_all(3)
    stars[2].fail(2, "error: data.train: no such file")
    assert [ends.of(index) for index in (0, 1)] == [(2, "error: data.train: no such file")] * 2


def test_of_a_defect_the_others_say_where_it_was():
    ends = Ends()
    _, stars = ends.start_all(2)
    stars[1].fail(1, "Traceback (most recent call last):\n  …\nRuntimeError: of a defect")
    name = f"{socket.gethostname()}, process id {os.getpid()}"
    assert ends.of(0) == (1, f"error: process 1 of 2 ({name}) has ended: RuntimeError: of a defect")


def test_a_process_that_never_comes_is_named():
    ends, address = Ends(), free_address()
    for index in (0, 2):
        threading.Thread(
            target=ends.start, args=(address, index, 4), kwargs={"start_timeout": 1.0}, daemon=True
        ).start()
    while len(ends.queues) < 2:
        time.sleep(0.01)
    name = f"{socket.gethostname()}, process id {os.getpid()}"
    expected = (
        f"error: processes 1, 3 of 4 did not come within 1 seconds (--start-timeout) to {address}; "
        f"there are 0 ({name}); 2 ({name})"
    )
    assert [ends.of(index) for index in (0, 2)] == [(1, expected)] * 2


def test_a_first_process_that_never_comes_is_named():
    address = free_address()
    with pytest.raises(WorkerError, match=rf"^process 1 of 2 did not reach process 0 at {address} within 0.2 seconds"):
        Ends().start(address, 1, 2, start_timeout=0.2)


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (1, 3, "error: 3 processes are said to make the run, but process 0 says 2"),
        (0, 2, "error: process 0 is there twice: "),
    ],
)
def test_a_process_that_does_not_fit_ends_all(index, count, message):
    ends, address = Ends(), free_address()
    threading.Thread(target=ends.start, args=(address, 0, 2), daemon=True).start()
    with say(address, b""):
        time.sleep(0.3)  # process 0 comes first
        with say(address, b'{"hello": %d, "of": %d, "name": "other"}\n' % (index, count)):
            status, said = ends.of(0)
    assert status == 2
    assert said.startswith(message)


def test_strangers_are_ignored():
    ends, address = Ends(), free_address()
    done = []
    threading.Thread(target=lambda: done.append(ends.start(address, 0, 2)), daemon=True).start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"exchange": 1}\n', b"[1]\n", b""):
        say(address, text).close()
    second = ends.start(address, 1, 2)
    threading.Thread(target=second.exchange, args=(1,), daemon=True).start()
    while not done:
        time.sleep(0.01)
    assert done[0].exchange(0) == [0, 1]


def test_an_address_that_cannot_be_had_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"coordinator's address {address}: process 0 cannot listen there"):
            Ends().start(address, 0, 2)


WORK = """
import argparse, sys
from neva_jax.errors import UserError
from neva_jax.parallel.processes import add_process_arguments, connected
parser = argparse.ArgumentParser()
add_process_arguments(parser)
with connected(parser.parse_args(), devices=False) as peers:
    print("stdout of", peers.index, flush=True)
    peers.exchange(None)
    if peers.index == 1:
        raise UserError("data.train[0].json=x: no such file")
    peers.exchange(None)  # never comes back
"""


def test_an_error_in_one_process_ends_the_other_with_the_same_status():
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, f"--coordinator={address}", "--processes=2", f"--process={index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert said[0] == ("stdout of 0\n", "error: data.train[0].json=x: no such file\n")
    assert said[1] == ("", "process 1: error: data.train[0].json=x: no such file\n")


# --- the parts of a batch --------------------------------------------------------------------------------------------


def parts_of(count):
    """Rows of two micro batches of 4 columns over `count` processes; the last two processes read the same columns."""
    if count == 2:
        columns, told = [[0, 1], [2, 3]], [True, True]
    else:
        columns, told = [[0, 1], [2, 3], [2, 3]], [True, True, False]
    return [
        (np.array([4 * micro + column for micro in range(2) for column in own]), np.full(4, speaks))
        for own, speaks in zip(columns, told, strict=True)
    ]


def shared_stream(count, sources, settings, tokenizer, rows, plans=None):
    """What each process sees: [(batches)]."""

    def work(star):
        share = Share(*parts_of(count)[star.index], star)
        return list(batches(sources, settings, tokenizer, 0, rows, plans, share))

    return together(count, work)


def assert_parts(whole, parts):
    """Each process has its rows of the batches, and all that is said of them."""
    for number, one in enumerate(whole):
        for part in (stream[number] for stream in parts):
            assert_same(part.arrays, {name: array[part.rows] for name, array in one.arrays.items()})
            assert part.bad_rows == one.bad_rows
            assert (part.consumed, part.samples, part.tokens) == (one.consumed, one.samples, one.tokens)
            assert part.complete
    assert {len(stream) for stream in parts} == {len(whole)}


@pytest.mark.parametrize(("count", "workers"), [(2, 0), (3, 0), (2, 1)])
def test_processes_read_the_rows_of_the_batches_of_one(config, tokenizer, broken_rows, count, workers):
    """Bad rows are told once, in order, whoever met them; a batch is as long as the longest row of all."""
    overrides = [broken_rows[0], "data.on_bad_row=skip", "data.length_buckets=[150]"]
    settings, sources = config(*overrides)
    whole = list(batches(sources, settings, tokenizer, 0, 24))
    assert sum(len(batch.bad_rows) for batch in whole) > 2
    settings, _ = config(*overrides, f"data.workers={workers}")
    assert_parts(whole, shared_stream(count, sources, settings, tokenizer, 24))


def test_the_longest_row_of_any_process_decides_the_length(config, tokenizer, tmp_path):
    rows = [conversation(f"row-{i}", "Hm?", "Well, " * (30 if i == 3 else 1)) for i in range(20)]
    settings, sources = config(write_rows(tmp_path, rows)[0], "data.max_length=512", "data.length_buckets=[192]")
    whole = list(batches(sources, settings, tokenizer, 0, 24))
    assert len({batch.arrays["tokens"].shape[1] for batch in whole}) > 1
    assert_parts(whole, shared_stream(2, sources, settings, tokenizer, 24))


def test_packed_rows_are_shared_alike(config, tokenizer, tmp_path):
    rows = [conversation(f"row-{i}", "Number?", f"It is {i}." * (i % 5 + 1)) for i in range(60)]
    settings, sources = config(write_rows(tmp_path, rows)[0], "data.pack=true", "data.max_length=512")
    plans = plan_rows(sources, settings, tokenizer, lambda _: None, "training")
    whole = list(batches(sources, settings, tokenizer, 0, 3 * SIZE, plans))
    assert whole[0].samples > SIZE
    assert_parts(whole, shared_stream(3, sources, settings, tokenizer, 3 * SIZE, plans))


def test_an_incomplete_part_makes_the_batch_incomplete_for_all(config, tokenizer, broken_rows):
    settings, sources = config(broken_rows[0], "data.on_bad_row=error")
    order = [sources.order(i).row for i in range(SIZE)]
    bad = [place for place, row in enumerate(order) if row in broken_rows[2]]
    (whole,) = batches(sources, settings, tokenizer, 0, SIZE)
    assert not whole.complete
    assert bad
    for ((part,),) in zip(shared_stream(2, sources, settings, tokenizer, SIZE), strict=True):
        assert not part.complete
        assert part.bad_rows == whole.bad_rows
