"""The exchange of what most ranks say alike."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from ckptengine.comm.distinct import gather_distinct


class Meeting:
    """Ranks in threads that gather through a list; counts the bytes that each sends."""

    def __init__(self, world_size):
        self.values = [b""] * world_size
        self.barrier = Barrier(world_size)
        self.sent = [[] for _ in range(world_size)]

    def rank(self, number):
        meeting = self

        class Rank:
            rank = number
            world_size = len(meeting.values)

            def all_gather(self, value, timeout):
                meeting.sent[number].append(len(value))
                meeting.values[number] = value
                meeting.barrier.wait(timeout)
                values = list(meeting.values)
                meeting.barrier.wait(timeout)
                return values

        return Rank()


def exchange(said):
    meeting = Meeting(len(said))
    with ThreadPoolExecutor(len(said)) as pool:
        jobs = [
            pool.submit(gather_distinct, meeting.rank(rank), b"note %d" % rank, documents, 10.0)
            for rank, documents in enumerate(said)
        ]
        results = [job.result() for job in jobs]
    assert all(result == results[0] for result in results)
    notes, distinct = results[0]
    assert notes == [b"note %d" % rank for rank in range(len(said))]
    return distinct, meeting.sent


def test_ranks_that_say_the_same_send_digests_only():
    distinct, sent = exchange([[b"a" * 10_000, b"b" * 10_000]] * 4)
    assert [one.documents for one in distinct] == [(b"a" * 10_000,), (b"b" * 10_000,)]
    assert [one.of_rank for one in distinct] == [(0, 0, 0, 0)] * 2
    assert sent == [[2 * 32 + 6]] * 4


def test_each_distinct_document_is_sent_once_by_its_lowest_rank():
    distinct, sent = exchange([[b"a", b"same"], [b"b", b"same"], [b"a", b"same"], [b"", b"same"], [b"b", b"same"]])
    assert distinct[0].documents == (b"a", b"b", b"")
    assert distinct[0].of_rank == (0, 1, 0, 2, 1)
    assert distinct[1].documents == (b"same",)
    assert [len(messages) for messages in sent] == [2] * 5
    assert [messages[1] for messages in sent] == [17, 17, 0, 0, 0]


def test_documents_that_all_differ_all_arrive():
    distinct, _ = exchange([[bytes([rank]) * rank] for rank in range(6)])
    assert distinct[0].documents == tuple(bytes([rank]) * rank for rank in range(6))
    assert distinct[0].of_rank == tuple(range(6))
